"""The backward kernels of strided attention in Triton.

Weights are computed anew from the log-normaliser. `delta` is the sum of output
times its gradient, what the softmax subtracts. One kernel owns tiles of queries,
two own tiles of keys: no two programs write to one place.
"""

import triton
import triton.language as tl

from keras_ebft.kernels.strided_attention.torch_triton_rows import (
    load_vectors,
    locate_columns,
    locate_rows,
    score,
    score_gradient,
    sees_document,
    sees_own,
    store_vectors,
)
from keras_ebft.kernels.torch_triton_common import dot

# ruff: noqa: N803


@triton.jit
def _query_step(
    found, query, upstream, keys, values, seen, normal, delta, scale, cap,
    HAS_CAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the gradient through one tile of keys."""
    zero = tl.zeros((ROWS, KEYS), dtype=tl.float32)
    scores = score(query, tl.trans(keys), zero, scale, cap, HAS_CAP, PRECISION, UPCAST)
    weights = tl.where(seen, tl.exp(scores - normal[:, None]), 0.0)
    weight_gradient = dot(upstream, tl.trans(values), zero, PRECISION, UPCAST)
    change = score_gradient(
        scores, weights, weight_gradient, delta[:, None], scale, cap, HAS_CAP
    )
    return dot(change.to(keys.dtype), keys, found, PRECISION, UPCAST)


@triton.jit
def query_gradient(
    query, key, value, document_key, document_value, anchors, starts, upstream,
    normaliser, deltas, gradient, samples, blocks, queries, num_keys, length, kv_heads,
    anchor_stride, offset, scale, cap,
    HAS_DOCUMENT: tl.constexpr, HAS_STARTS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries. Programs: `(row tiles, B * Hkv)`."""
    document, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, pair, step, anchor, start = locate_rows(
        row, anchors, starts, document, kv_head, samples, blocks, queries, kv_heads,
        anchor_stride, offset, GROUP, HAS_STARTS, HAS_DOCUMENT,
    )  # fmt: skip
    inside = pair >= 0
    vectors = load_vectors(query, place, inside, SIZE, PADDED)
    above = load_vectors(upstream, place, inside, SIZE, PADDED)
    normal = tl.load(normaliser + place, mask=inside, other=0.0)
    delta = tl.load(deltas + place, mask=inside, other=0.0)
    found = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    if HAS_DOCUMENT:
        last = tl.max(anchor, axis=0)
        first = start
        if WINDOW > 0:
            first = tl.maximum(start, anchor + step - WINDOW + 1)
        first = tl.min(tl.where(inside, first, last), axis=0)
        for tile in range(tl.maximum(first, 0) // KEYS * KEYS, last, KEYS):
            index = tile + tl.arange(0, KEYS)
            exists = index < length
            key_place = (document.to(tl.int64) * length + index) * kv_heads + kv_head
            keys = load_vectors(document_key, key_place, exists, SIZE, PADDED)
            values = load_vectors(document_value, key_place, exists, SIZE, PADDED)
            seen = sees_document(
                index[None, :], length, step[:, None], anchor[:, None],
                start[:, None], WINDOW,
            )  # fmt: skip
            found = _query_step(
                found, vectors, above, keys, values, seen, normal, delta, scale, cap,
                HAS_CAP, ROWS, KEYS, PRECISION, UPCAST,
            )  # fmt: skip
    last_pair = tl.max(pair, axis=0)
    first_pair = tl.min(tl.where(inside, pair, last_pair), axis=0)
    for tile in range(first_pair * num_keys, (last_pair + 1) * num_keys, KEYS):
        own_place, own_pair, own_step = locate_columns(
            tile + tl.arange(0, KEYS), document, kv_head, samples, blocks, num_keys,
            kv_heads,
        )  # fmt: skip
        exists = own_pair >= 0
        keys = load_vectors(key, own_place, exists, SIZE, PADDED)
        values = load_vectors(value, own_place, exists, SIZE, PADDED)
        seen = sees_own(
            own_pair[None, :], own_step[None, :], pair[:, None], step[:, None], WINDOW
        )
        found = _query_step(
            found, vectors, above, keys, values, seen, normal, delta, scale, cap,
            HAS_CAP, ROWS, KEYS, PRECISION, UPCAST,
        )  # fmt: skip
    store_vectors(gradient, place, inside, found, SIZE, PADDED)


@triton.jit
def _key_step(
    key_found, value_found, keys, values, query, upstream, seen, normal, delta, scale,
    cap, HAS_CAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the gradient through one tile of rows; scores are `[KEYS, ROWS]`."""
    zero = tl.zeros((KEYS, ROWS), dtype=tl.float32)
    scores = score(keys, tl.trans(query), zero, scale, cap, HAS_CAP, PRECISION, UPCAST)
    weights = tl.where(seen, tl.exp(scores - normal[None, :]), 0.0)
    value_found = dot(
        weights.to(upstream.dtype), upstream, value_found, PRECISION, UPCAST
    )
    weight_gradient = dot(values, tl.trans(upstream), zero, PRECISION, UPCAST)
    change = score_gradient(
        scores, weights, weight_gradient, delta[None, :], scale, cap, HAS_CAP
    )
    key_found = dot(change.to(query.dtype), query, key_found, PRECISION, UPCAST)
    return key_found, value_found


@triton.jit
def document_gradient(
    query, document_key, document_value, anchors, starts, upstream, normaliser, deltas,
    first_blocks, last_blocks, key_gradient, value_gradient, documents, samples,
    blocks, queries, length, kv_heads, anchor_stride, offset, splits, scale, cap,
    HAS_STARTS: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of document keys and values, `[splits, B, T, Hkv, d]` to be summed.

    `first_blocks` and `last_blocks`, `[B, key tiles]`: blocks that see any key of a
    tile lie between them (none if the last comes before the first). Programs:
    `(key tiles, splits, B * Hkv)`; a split has part of the rows.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    document, kv_head = tl.program_id(2) // kv_heads, tl.program_id(2) % kv_heads
    index = tile * KEYS + tl.arange(0, KEYS)
    exists = index < length
    key_place = (document.to(tl.int64) * length + index) * kv_heads + kv_head
    keys = load_vectors(document_key, key_place, exists, SIZE, PADDED)
    values = load_vectors(document_value, key_place, exists, SIZE, PADDED)
    key_found = tl.zeros((KEYS, PADDED), dtype=tl.float32)
    value_found = tl.zeros((KEYS, PADDED), dtype=tl.float32)
    bounds = document * tl.num_programs(0) + tile
    block_rows = samples * GROUP * queries
    first = tl.load(first_blocks + bounds) * block_rows
    end = (tl.load(last_blocks + bounds) + 1) * block_rows
    share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), ROWS), splits) * ROWS
    first = first + split * share
    for row_start in range(first, tl.minimum(first + share, end), ROWS):
        row = row_start + tl.arange(0, ROWS)
        place, pair, step, anchor, start = locate_rows(
            row, anchors, starts, document, kv_head, samples, blocks, queries,
            kv_heads, anchor_stride, offset, GROUP, HAS_STARTS, True,
        )  # fmt: skip
        inside = (pair >= 0) & (row < end)
        vectors = load_vectors(query, place, inside, SIZE, PADDED)
        above = load_vectors(upstream, place, inside, SIZE, PADDED)
        normal = tl.load(normaliser + place, mask=inside, other=0.0)
        delta = tl.load(deltas + place, mask=inside, other=0.0)
        seen = sees_document(
            index[:, None], length, step[None, :], anchor[None, :], start[None, :],
            WINDOW,
        )  # fmt: skip
        key_found, value_found = _key_step(
            key_found, value_found, keys, values, vectors, above,
            seen & inside[None, :], normal, delta, scale, cap, HAS_CAP, ROWS, KEYS,
            PRECISION, UPCAST,
        )  # fmt: skip
    target = split.to(tl.int64) * documents * length * kv_heads + key_place
    store_vectors(key_gradient, target, exists, key_found, SIZE, PADDED)
    store_vectors(value_gradient, target, exists, value_found, SIZE, PADDED)


@triton.jit
def own_gradient(
    query, key, value, anchors, starts, upstream, normaliser, deltas, key_gradient,
    value_gradient, samples, blocks, queries, num_keys, kv_heads, offset, scale, cap,
    WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the blocks' own keys and values.

    Programs: `(column tiles, B * Hkv)`.
    """
    document, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    own_place, own_pair, own_step = locate_columns(
        column, document, kv_head, samples, blocks, num_keys, kv_heads
    )
    exists = own_pair >= 0
    keys = load_vectors(key, own_place, exists, SIZE, PADDED)
    values = load_vectors(value, own_place, exists, SIZE, PADDED)
    key_found = tl.zeros((KEYS, PADDED), dtype=tl.float32)
    value_found = tl.zeros((KEYS, PADDED), dtype=tl.float32)
    last_pair = tl.max(own_pair, axis=0)
    first_pair = tl.min(tl.where(exists, own_pair, last_pair), axis=0)
    pair_rows = GROUP * queries
    for row_start in range(first_pair * pair_rows, (last_pair + 1) * pair_rows, ROWS):
        row = row_start + tl.arange(0, ROWS)
        place, pair, step, _anchor, _start = locate_rows(
            row, anchors, starts, document, kv_head, samples, blocks, queries,
            kv_heads, 0, offset, GROUP, False, False,
        )  # fmt: skip
        inside = pair >= 0
        vectors = load_vectors(query, place, inside, SIZE, PADDED)
        above = load_vectors(upstream, place, inside, SIZE, PADDED)
        normal = tl.load(normaliser + place, mask=inside, other=0.0)
        delta = tl.load(deltas + place, mask=inside, other=0.0)
        seen = sees_own(
            own_pair[:, None], own_step[:, None], pair[None, :], step[None, :], WINDOW
        )
        key_found, value_found = _key_step(
            key_found, value_found, keys, values, vectors, above, seen, normal, delta,
            scale, cap, HAS_CAP, ROWS, KEYS, PRECISION, UPCAST,
        )  # fmt: skip
    store_vectors(key_gradient, own_place, exists, key_found, SIZE, PADDED)
    store_vectors(value_gradient, own_place, exists, value_found, SIZE, PADDED)
