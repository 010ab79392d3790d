"""The forward kernel of strided attention in Triton."""

import triton
import triton.language as tl

from keras_ebft.kernels.strided_attention.torch_triton_rows import (
    load_vectors,
    locate_columns,
    locate_rows,
    score,
    sees_document,
    sees_own,
    store_vectors,
)
from keras_ebft.kernels.torch_triton_common import dot

# ruff: noqa: N803


@triton.jit
def _accumulate(
    state, total, largest, scores, seen, values,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    if MASKED:
        scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp(scores - higher[:, None])
    if MASKED:
        # Rows that have seen nothing yet have no largest score.
        weights = tl.where(seen, weights, 0.0)
    shrink = tl.exp(largest - higher)
    total = shrink * total + tl.sum(weights, axis=1)
    state = shrink[:, None] * state
    state = dot(weights.to(values.dtype), values, state, PRECISION, UPCAST)
    return state, total, higher


@triton.jit
def _read_document(
    state, total, largest, query, document_key, document_value, first, last, document,
    kv_head, kv_heads, length, step, anchor, start, scale, cap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attends to document keys `first ... last - 1`, a tile at a time."""
    for tile in range(first, last, KEYS):
        index = tile + tl.arange(0, KEYS)
        inside = index < length
        place = (document.to(tl.int64) * length + index) * kv_heads + kv_head
        keys = load_vectors(document_key, place, inside, SIZE, PADDED)
        zero = tl.zeros((ROWS, KEYS), dtype=tl.float32)
        scores = score(
            query, tl.trans(keys), zero, scale, cap, HAS_CAP, PRECISION, UPCAST
        )
        seen = sees_document(
            index[None, :], length, step[:, None], anchor[:, None], start[:, None],
            WINDOW,
        )  # fmt: skip
        values = load_vectors(document_value, place, inside, SIZE, PADDED)
        state, total, largest = _accumulate(
            state, total, largest, scores, seen, values, MASKED, PRECISION, UPCAST
        )
    return state, total, largest


@triton.jit
def attend(
    query, key, value, document_key, document_value, anchors, starts, output,
    normaliser, samples, blocks, queries, num_keys, length, kv_heads, anchor_stride,
    offset, scale, cap,
    HAS_DOCUMENT: tl.constexpr, HAS_STARTS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output, and the log-normaliser of the scores for the backward pass.

    Programs: `(row tiles, B * Hkv)`. `WINDOW` 0 is none.
    """
    document, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, pair, step, anchor, start = locate_rows(
        row, anchors, starts, document, kv_head, samples, blocks, queries, kv_heads,
        anchor_stride, offset, GROUP, HAS_STARTS, HAS_DOCUMENT,
    )  # fmt: skip
    inside = pair >= 0
    vectors = load_vectors(query, place, inside, SIZE, PADDED)
    state = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    largest = tl.full((ROWS,), -1e30, dtype=tl.float32)
    if HAS_DOCUMENT:
        last = tl.max(anchor, axis=0)
        first = start
        if WINDOW > 0:
            first = tl.maximum(start, anchor + step - WINDOW + 1)
        first = tl.min(tl.where(inside, first, last), axis=0)
        first = tl.maximum(first, 0) // KEYS * KEYS
        # Tiles that every row sees whole need no mask.
        middle = first
        if not HAS_STARTS and WINDOW == 0:
            middle = tl.min(tl.where(inside, anchor, last), axis=0) // KEYS * KEYS
            state, total, largest = _read_document(
                state, total, largest, vectors, document_key, document_value, first,
                middle, document, kv_head, kv_heads, length, step, anchor, start,
                scale, cap, False, WINDOW, HAS_CAP, SIZE, PADDED, ROWS, KEYS,
                PRECISION, UPCAST,
            )  # fmt: skip
        state, total, largest = _read_document(
            state, total, largest, vectors, document_key, document_value, middle, last,
            document, kv_head, kv_heads, length, step, anchor, start, scale, cap,
            True, WINDOW, HAS_CAP, SIZE, PADDED, ROWS, KEYS, PRECISION, UPCAST,
        )  # fmt: skip
    # Columns of the pairs of this tile of rows.
    last_pair = tl.max(pair, axis=0)
    first_pair = tl.min(tl.where(inside, pair, last_pair), axis=0)
    for tile in range(first_pair * num_keys, (last_pair + 1) * num_keys, KEYS):
        column = tile + tl.arange(0, KEYS)
        own_place, own_pair, own_step = locate_columns(
            column, document, kv_head, samples, blocks, num_keys, kv_heads
        )
        exists = own_pair >= 0
        keys = load_vectors(key, own_place, exists, SIZE, PADDED)
        zero = tl.zeros((ROWS, KEYS), dtype=tl.float32)
        scores = score(
            vectors, tl.trans(keys), zero, scale, cap, HAS_CAP, PRECISION, UPCAST
        )
        seen = sees_own(
            own_pair[None, :], own_step[None, :], pair[:, None], step[:, None], WINDOW
        )
        values = load_vectors(value, own_place, exists, SIZE, PADDED)
        state, total, largest = _accumulate(
            state, total, largest, scores, seen, values, True, PRECISION, UPCAST
        )
    total = tl.where(inside, total, 1.0)
    store_vectors(output, place, inside, state / total[:, None], SIZE, PADDED)
    tl.store(normaliser + place, largest + tl.log(total), mask=inside)
