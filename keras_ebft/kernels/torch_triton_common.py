"""What the Triton kernels share: settings, and logits of one tile."""

import contextlib

import torch
import triton
import triton.language as tl

from keras_ebft.backend.device import TRITON_INTERPRETED_ON
from keras_ebft.backend.measuring import product_precision

# Decided when Triton is imported.
INTERPRETED = bool(TRITON_INTERPRETED_ON)


def on_device_of(tensor):
    """Context in which kernels run where a tensor is."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def capability_of(tensor):
    """`(major, minor)` of a tensor's device; `None` in the interpreter."""
    return None if INTERPRETED else torch.cuda.get_device_capability(tensor.device)


def dot_settings():
    """Constants that every kernel with a `tl.dot` takes.

    float32 products follow `torch.set_float32_matmul_precision`, as PyTorch's own
    do. Triton's interpreter gets bfloat16 products wrong, unless they are float32.
    """
    exact = product_precision() in ("highest", "ieee", "none")
    return {"PRECISION": "ieee" if exact else "tf32", "UPCAST": INTERPRETED}


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # noqa: N803
    """`a b + accumulator` in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def soft_capped(x, cap):
    """`cap * tanh(x / cap)`."""
    return cap * (2.0 / (1.0 + tl.exp(-2.0 * x / cap)) - 1.0)


@triton.jit
def logits_tile(
    hidden, head, rows, columns, num_rows, num_columns, width, row_stride,
    head_row_stride, head_column_stride, temperature, cap,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Capped logits over the temperature, float32 `[ROWS, COLUMNS]`.

    Rows and columns beyond the end repeat the last ones; the caller hides them.
    """
    row = tl.minimum(rows, num_rows - 1).to(tl.int64)
    column = tl.minimum(columns, num_columns - 1).to(tl.int64)
    hidden_rows = hidden + row[:, None] * row_stride
    head_rows = head + column[None, :] * head_row_stride
    logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < width
        one = tl.load(hidden_rows + depth[None, :], mask=inside[None, :], other=0.0)
        two = tl.load(
            head_rows + depth[:, None] * head_column_stride,
            mask=inside[:, None],
            other=0.0,
        )
        logits = dot(one, two, logits, PRECISION, UPCAST)
    if HAS_CAP:
        logits = soft_capped(logits, cap)
    return logits / temperature
