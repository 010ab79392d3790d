"""Where rows and keys of strided attention stand, and how they score, in Triton.

The queries of one document that share a key head are *rows*: block by block, within
it sample by sample, and there head by head and token by token. A tile of rows thus
holds whole blocks with nearly the same anchor, and all samples and heads of a block
read a document key together. Keys of the blocks' own are *columns*: block by block,
sample by sample. All tensors are contiguous.
"""

import triton
import triton.language as tl

from keras_ebft.kernels.torch_triton_common import dot, soft_capped

# ruff: noqa: N803


@triton.jit
def locate_rows(
    row, anchors, starts, document, kv_head, samples, blocks, queries, kv_heads,
    anchor_stride, offset,
    GROUP: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
):  # fmt: skip
    """Place of each row's query, its pair of block and sample, and what it sees.

    Returns:
        `(place, pair, step, anchor, start)`: index of the query in
        `[B, n, K, Q, H]`; `block * n + sample`; index within the block's tokens;
        document keys `start ... anchor - 1` are seen.
    """
    last = blocks * samples * GROUP * queries - 1
    inside = row <= last
    row = tl.minimum(row, last)
    pair = row // (GROUP * queries)
    within = row % (GROUP * queries)
    block, sample = pair // samples, pair % samples
    query = within % queries
    head = kv_head * GROUP + within // queries
    place = ((document * samples + sample) * blocks + block).to(tl.int64) * queries
    place = (place + query) * (kv_heads * GROUP) + head
    anchor = tl.zeros_like(row)
    start = tl.zeros_like(row)
    if HAS_DOCUMENT:
        anchor = tl.load(anchors + document * anchor_stride + block)
        if HAS_STARTS:
            start = tl.load(starts + document * blocks + block)
    # Rows beyond the end see nothing.
    anchor = tl.where(inside, anchor, 0)
    return place, tl.where(inside, pair, -1), offset + query, anchor, start


@triton.jit
def locate_columns(column, document, kv_head, samples, blocks, keys, kv_heads):
    """Place of each column's key in `[B, n, K, P, Hkv]`, its pair and its step."""
    inside = column < blocks * samples * keys
    safe = tl.minimum(column, blocks * samples * keys - 1)
    pair, step = safe // keys, safe % keys
    block, sample = pair // samples, pair % samples
    place = ((document * samples + sample) * blocks + block).to(tl.int64) * keys
    place = (place + step) * kv_heads + kv_head
    return place, tl.where(inside, pair, -2), step


@triton.jit
def load_vectors(
    tensor, place, inside, SIZE: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Vectors at places, `[places, PADDED]`, 0 where not inside."""
    width = tl.arange(0, PADDED)
    mask = inside[:, None] & (width[None, :] < SIZE)
    return tl.load(tensor + place[:, None] * SIZE + width[None, :], mask, other=0.0)


@triton.jit
def store_vectors(
    tensor, place, inside, vectors, SIZE: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Writes vectors to places."""
    width = tl.arange(0, PADDED)
    mask = inside[:, None] & (width[None, :] < SIZE)
    vectors = vectors.to(tensor.dtype.element_ty)
    tl.store(tensor + place[:, None] * SIZE + width[None, :], vectors, mask)


@triton.jit
def sees_document(index, length, step, anchor, start, WINDOW: tl.constexpr):
    """Whether rows see document keys; broadcasts its arguments."""
    seen = (index < anchor) & (index >= start) & (index < length)
    if WINDOW > 0:
        seen = seen & (anchor + step - index < WINDOW)
    return seen


@triton.jit
def sees_own(column_pair, column_step, pair, step, WINDOW: tl.constexpr):
    """Whether rows see keys of their own block and sample; broadcasts."""
    seen = (column_pair == pair) & (column_step <= step)
    if WINDOW > 0:
        seen = seen & (step - column_step < WINDOW)
    return seen


@triton.jit
def score(
    one, two, zero, scale, cap,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Capped scores of vectors `[n, d]` with vectors `[d, m]`, float32."""
    scores = dot(one, two, zero, PRECISION, UPCAST) * scale
    if HAS_CAP:
        scores = soft_capped(scores, cap)
    return scores


@triton.jit
def score_gradient(
    scores, weights, weight_gradient, delta, scale, cap, HAS_CAP: tl.constexpr
):
    """Gradient of the plain products, from that of the weights."""
    found = weights * (weight_gradient - delta)
    if HAS_CAP:
        tangent = scores / cap
        found *= 1.0 - tangent * tangent
    return found * scale
