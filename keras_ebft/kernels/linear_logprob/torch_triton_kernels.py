"""Kernel bodies of `linear_logprob` in Triton."""

import triton
import triton.language as tl

from keras_ebft.kernels.torch_triton_common import logits_tile

# ruff: noqa: N803


@triton.jit
def reduce_logits(
    hidden, head, labels, largest_out, total_out, moment_out, chosen_out,
    num_rows, num_columns, width, row_stride, head_row_stride, head_column_stride,
    temperature, cap, tiles_per_split,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Reduces a row's logits z of one split of the vocabulary to four numbers.

    With m the largest: `m`, `sum exp(z - m)`, `sum exp(z - m) (z - m)` and the
    label's logit, 0 in splits without it; each `[splits, R]`. Programs:
    `(row tiles, splits)`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    label = tl.load(labels + rows, mask=rows < num_rows, other=-1)
    # Finite, because differences of infinities are no numbers.
    largest = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)
    chosen = tl.zeros((ROWS,), dtype=tl.float32)
    first = split * tiles_per_split * COLUMNS
    last = tl.minimum(first + tiles_per_split * COLUMNS, num_columns)
    for start in range(first, last, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = logits_tile(
            hidden, head, rows, columns, num_rows, num_columns, width, row_stride,
            head_row_stride, head_column_stride, temperature, cap,
            HAS_CAP, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        exists = columns[None, :] < num_columns
        hit = columns[None, :] == label[:, None]
        chosen += tl.sum(tl.where(hit, logits, 0.0), axis=1)
        shown = tl.where(exists, logits, -1e30)
        higher = tl.maximum(largest, tl.max(shown, axis=1))
        lifted = largest - higher
        above = tl.where(exists, logits - higher[:, None], 0.0)
        weight = tl.where(exists, tl.exp(above), 0.0)
        shrink = tl.exp(lifted)
        moment = shrink * (moment + total * lifted) + tl.sum(weight * above, axis=1)
        total = shrink * total + tl.sum(weight, axis=1)
        largest = higher
    place = split.to(tl.int64) * num_rows + rows
    inside = rows < num_rows
    tl.store(largest_out + place, largest, mask=inside)
    tl.store(total_out + place, total, mask=inside)
    tl.store(moment_out + place, moment, mask=inside)
    tl.store(chosen_out + place, chosen, mask=inside)


@triton.jit
def logit_gradient(
    hidden, head, labels, normaliser, entropy, log_prob_upstream, entropy_upstream,
    gradient, num_rows, num_columns, width, row_stride, head_row_stride,
    head_column_stride, temperature, cap, first_column, chunk_columns,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of the products `hidden head^T` for a chunk of the vocabulary.

    `gradient` is `[R, chunk_columns]`, its first column `first_column`. Programs:
    `(row tiles, column tiles)`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = first_column + place
    logits = logits_tile(
        hidden, head, rows, columns, num_rows, num_columns, width, row_stride,
        head_row_stride, head_column_stride, temperature, cap,
        HAS_CAP, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    inside = rows < num_rows
    label = tl.load(labels + rows, mask=inside, other=-1)
    normal = tl.load(normaliser + rows, mask=inside, other=0.0)
    spread = tl.load(entropy + rows, mask=inside, other=0.0)
    of_log_prob = tl.load(log_prob_upstream + rows, mask=inside, other=0.0)
    of_entropy = tl.load(entropy_upstream + rows, mask=inside, other=0.0)
    log_probability = logits - normal[:, None]
    probability = tl.exp(log_probability)
    hit = tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
    # d log_prob / dz = onehot - p;  d entropy / dz = -p (log p + entropy).
    found = of_log_prob[:, None] * (hit - probability)
    found -= of_entropy[:, None] * probability * (log_probability + spread[:, None])
    if HAS_CAP:
        tangent = logits * (temperature / cap)
        found *= 1.0 - tangent * tangent
    found /= temperature
    target = gradient + rows[:, None].to(tl.int64) * chunk_columns + place[None, :]
    mask = inside[:, None] & (place[None, :] < chunk_columns)
    tl.store(target, found.to(gradient.dtype.element_ty), mask=mask)
