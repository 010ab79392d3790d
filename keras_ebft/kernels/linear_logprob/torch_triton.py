"""`linear_logprob` for CUDA: an online reduction, and logits anew for the gradient.

Forward, each program runs over a part of the vocabulary for a tile of rows and
keeps four numbers per row. Backward, logits are computed again for a chunk of the
vocabulary, turned into their gradient, and multiplied by PyTorch: of `[R, V]` only
a chunk of at most `CHUNK_ELEMENTS` is ever in memory. No atomics: the same numbers
every time.
"""

from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from keras_ebft.kernels.linear_logprob.torch_triton_kernels import (
    logit_gradient,
    reduce_logits,
)
from keras_ebft.kernels.torch_triton_common import (
    capability_of,
    dot_settings,
    on_device_of,
)

# Elements of the logits' gradient in memory at a time: 32 MiB in bfloat16.
CHUNK_ELEMENTS = 2**24
# Programs that the forward pass is split into at least, several per processor.
MIN_PROGRAMS = 512


class Tiles(NamedTuple):
    """Sizes of the tiles of one program, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def constants(self):
        """As arguments of a kernel."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}

    @property
    def options(self):
        """As compiler options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def choose_tiles(dtype, capability):
    """`Tiles` for operands of a dtype on a CUDA device.

    Args:
        dtype: `torch.dtype` of `hidden` and `head`.
        capability: `(major, minor)`, or `None` in the interpreter, where every
            program is slow and tiles are small enough to have several.
    """
    if capability is None:
        return Tiles(32, 128, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 3)
    if capability >= (10, 0):
        return Tiles(128, 64, 64, 8, 4)
    if capability >= (9, 0):
        return Tiles(128, 128, 64, 8, 4)
    return Tiles(128, 128, 32, 8, 4)


def linear_logprob_triton(hidden, head, labels, *, temperature=1.0, soft_cap=None):
    """See `keras_ebft.kernels.linear_logprob`."""
    return _LinearLogProb.apply(hidden, head, labels, temperature, soft_cap)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, temperature, soft_cap):
        product = _Product(hidden, head, temperature, soft_cap)
        labels = labels.to(torch.int32).contiguous()
        with on_device_of(hidden):
            log_prob, entropy, normaliser = product.reduce(labels)
        ctx.options = (temperature, soft_cap)
        ctx.save_for_backward(hidden, head, labels, normaliser, entropy)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, log_prob_upstream, entropy_upstream):
        hidden, head, *rows = ctx.saved_tensors
        product = _Product(hidden, head, *ctx.options)
        rows += [log_prob_upstream.contiguous(), entropy_upstream.contiguous()]
        with on_device_of(hidden):
            found = product.gradients(ctx.needs_input_grad, *rows)
        return (*found, None, None, None)


class _Product:
    """`hidden head^T` that is never there as a whole."""

    def __init__(self, hidden, head, temperature, soft_cap):
        self.hidden = hidden.contiguous()
        # Any strides: an untied head is the transpose of its variable.
        self.head = head
        self.tiles = choose_tiles(hidden.dtype, capability_of(hidden))
        self.sizes = (
            hidden.shape[0],
            head.shape[0],
            hidden.shape[1],
            self.hidden.stride(0),
            *head.stride(),
            float(temperature),
            float(soft_cap or 0.0),
        )
        self.settings = {
            "HAS_CAP": soft_cap is not None,
            **self.tiles.constants,
            **dot_settings(),
            **self.tiles.options,
        }

    def reduce(self, labels):
        """`(log_prob, entropy, log-normaliser)`, each float32 `[R]`."""
        rows, columns = self.sizes[:2]
        row_tiles = triton.cdiv(rows, self.tiles.rows)
        column_tiles = triton.cdiv(columns, self.tiles.columns)
        splits = min(triton.cdiv(MIN_PROGRAMS, row_tiles), column_tiles)
        per_split = triton.cdiv(column_tiles, splits)
        splits = triton.cdiv(column_tiles, per_split)
        parts = [
            torch.empty((splits, rows), dtype=torch.float32, device=self.hidden.device)
            for _ in range(4)
        ]
        reduce_logits[row_tiles, splits](
            self.hidden, self.head, labels, *parts, *self.sizes, per_split,
            **self.settings,
        )  # fmt: skip
        return _join(*parts)

    def gradients(self, needed, *rows_of_numbers):
        """Gradients with respect to `hidden` and `head`, `None` where not needed.

        Args:
            needed: which of the two are needed.
            *rows_of_numbers: labels, log-normaliser, entropy and the gradients of
                log-probabilities and entropy, `[R]`.
        """
        rows, columns, width = self.sizes[:3]
        device = self.hidden.device
        hidden_gradient = head_gradient = None
        if needed[0]:
            hidden_gradient = torch.zeros((rows, width), device=device)
        if needed[1]:
            head_gradient = torch.empty(
                (columns, width), dtype=self.head.dtype, device=device
            )
        size = max(CHUNK_ELEMENTS // rows, self.tiles.columns)
        size = triton.cdiv(size, self.tiles.columns) * self.tiles.columns
        for first in range(0, columns, size):
            chunk = slice(first, min(first + size, columns))
            gradient = self._logit_gradient(chunk, rows_of_numbers)
            if needed[0]:
                hidden_gradient += gradient @ self.head[chunk]
            if needed[1]:
                torch.matmul(gradient.T, self.hidden, out=head_gradient[chunk])
        if needed[0]:
            hidden_gradient = hidden_gradient.to(self.hidden.dtype)
        return hidden_gradient, head_gradient

    def _logit_gradient(self, chunk, rows_of_numbers):
        """Gradient of the products with some of the tokens, `[R, chunk]`."""
        rows, size = self.sizes[0], chunk.stop - chunk.start
        gradient = torch.empty(
            (rows, size), dtype=self.hidden.dtype, device=self.hidden.device
        )
        grid = (
            triton.cdiv(rows, self.tiles.rows),
            triton.cdiv(size, self.tiles.columns),
        )
        logit_gradient[grid](
            self.hidden, self.head, *rows_of_numbers, gradient, *self.sizes,
            chunk.start, size, **self.settings,
        )  # fmt: skip
        return gradient


def _join(largest, total, moment, chosen):
    """The numbers of all splits together; see `reduce_logits`."""
    highest = largest.amax(dim=0)
    lifted = largest - highest
    shrink = lifted.exp()
    whole = (shrink * total).sum(dim=0)
    moment = (shrink * (moment + total * lifted)).sum(dim=0)
    normaliser = highest + whole.log()
    return chosen.sum(dim=0) - normaliser, whole.log() - moment / whole, normaliser
