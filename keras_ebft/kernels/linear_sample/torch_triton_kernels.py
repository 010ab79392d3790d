"""Kernel bodies of `linear_sample` in Triton."""

import triton
import triton.language as tl

from keras_ebft.kernels.torch_triton_common import logits_tile, soft_capped

# ruff: noqa: N803


@triton.jit
def reduce_groups(
    hidden, head, largest_out, total_out, place_out, num_rows, num_columns, width,
    row_stride, head_row_stride, head_column_stride, temperature, cap, num_groups,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Reduces a row's logits z of one group of tokens to three numbers.

    With m the largest: `m`, `sum exp(z - m)` and the token of m, each
    `[R, groups]`. Programs: `(row tiles, groups)`; a group has `COLUMNS` tokens.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    logits = logits_tile(
        hidden, head, rows, columns, num_rows, num_columns, width, row_stride,
        head_row_stride, head_column_stride, temperature, cap,
        HAS_CAP, ROWS, COLUMNS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    exists = columns[None, :] < num_columns
    logits = tl.where(exists, logits, -1e30)
    largest = tl.max(logits, axis=1)
    weights = tl.where(exists, tl.exp(logits - largest[:, None]), 0.0)
    # The first of the likeliest.
    token = tl.where(logits == largest[:, None], columns[None, :], num_columns)
    target = rows.to(tl.int64) * num_groups + group
    inside = rows < num_rows
    tl.store(largest_out + target, largest, mask=inside)
    tl.store(total_out + target, tl.sum(weights, axis=1), mask=inside)
    tl.store(place_out + target, tl.min(token, axis=1), mask=inside)


@triton.jit
def draw_in_group(
    hidden, head, groups, goals, highest, tokens_out, logits_out, num_rows,
    num_columns, width, row_stride, head_row_stride, head_column_stride, temperature,
    cap, below_one,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The first token of each row's group whose running sum exceeds the row's goal.

    `groups` int32 and `goals` float32, `[R]`; weights are `exp(z - highest)`.
    Returns tokens and their logits. Programs: `(row tiles,)`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    row = tl.minimum(rows, num_rows - 1).to(tl.int64)
    group = tl.load(groups + row)
    columns = group[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    column = tl.minimum(columns, num_columns - 1).to(tl.int64)
    logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        exists = depth < width
        one = tl.load(
            hidden + row[:, None] * row_stride + depth[None, :],
            mask=exists[None, :],
            other=0.0,
        )
        two = tl.load(
            head
            + column[:, :, None] * head_row_stride
            + depth[None, None, :] * head_column_stride,
            mask=exists[None, None, :],
            other=0.0,
        )
        product = one.to(tl.float32)[:, None, :] * two.to(tl.float32)
        logits += tl.sum(product, axis=2)
    if HAS_CAP:
        logits = soft_capped(logits, cap)
    logits = logits / temperature
    top = tl.load(highest + row)
    weights = tl.where(columns < num_columns, tl.exp(logits - top[:, None]), 0.0)
    running = tl.cumsum(weights, axis=1)
    goal = tl.minimum(tl.load(goals + row), below_one * tl.max(running, axis=1))
    place = tl.sum((running <= goal[:, None]).to(tl.int32), axis=1)
    # Should a group's weights all round to 0, any of its tokens is as good.
    place = tl.minimum(place, tl.minimum(COLUMNS, num_columns - group * COLUMNS) - 1)
    chosen = tl.arange(0, COLUMNS)[None, :] == place[:, None]
    tl.store(tokens_out + rows, group * COLUMNS + place, mask=inside)
    logit = tl.sum(tl.where(chosen, logits, 0.0), axis=1)
    tl.store(logits_out + rows, logit, mask=inside)
