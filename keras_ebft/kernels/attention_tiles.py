"""Attention in tiles of queries and keys, with scores made again for the gradient.

Of a layer's attention only what goes in, what comes out and one log-normaliser per
query stay in memory; scores exist one tile at a time. The loops are primitives, so
that compiling takes the same time whatever the number of tiles.

Queries are `[N, B, Hkv, C, Q, d]`: N tiles, and for each head of keys C groups of Q
queries that share keys of their own. The `M = C * Q` queries of a tile meet a tile of
shared keys in one product.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_ebft.backend.gradients import differentiable, scan_tiles

# Keys met at once: in a compiled loop, where a tile should fit a cache, and in one
# counted in Python, where every operation costs time of its own.
KEY_TILE = 256
LARGE_KEY_TILE = 1024
HIDDEN_SCORE = float("-inf")
# Below any score, and finite: the largest score a query saw before its first key.
LOWEST_SCORE = -1e30
# Normaliser of a query that sees no key at all, whose output is 0.
SMALLEST_SUM = 1e-30


class Ranges(NamedTuple):
    """Which shared keys each query sees.

    Attributes:
        low: int32 tensor `[N, B or 1, M]`: the first key that is seen.
        high: int32 tensor `[N, B or 1, M]`: one past the last.
        first: int array or tensor `[N]`: no query of a tile sees keys before it.
        last: int array or tensor `[N]`: nor from here on.
    """

    low: Any
    high: Any
    first: Any
    last: Any


class OwnKeys(NamedTuple):
    """Keys that each group of queries has for itself.

    Attributes:
        key: float tensor `[N, B, Hkv, C, P, d]`.
        value: float tensor `[N, B, Hkv, C, P, d]`.
        seen: bool tensor `[Q, P]`.
    """

    key: Any
    value: Any
    seen: Any


class Scores(NamedTuple):
    """How scores follow from products of queries and keys."""

    scale: float
    soft_cap: Any

    def of(self, query, key):
        """Scores of every query against every key, float32."""
        scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
        scores = ops.cast(scores, "float32") * self.scale
        if self.soft_cap is None:
            return scores
        return self.soft_cap * ops.tanh(scores / self.soft_cap)

    def slope(self, scores):
        """Derivative of scores by products, from the scores."""
        if self.soft_cap is None:
            return self.scale
        return self.scale * (1.0 - ops.square(scores / self.soft_cap))


def tile_attention(query, key, value, ranges, scores, own=None):
    """Softmax attention over shared and own keys together, differentiable.

    Args:
        query: float tensor `[N, B, Hkv, C, Q, d]`.
        key: float tensor `[B, Hkv, T, d]`, shared by all queries.
        value: float tensor `[B, Hkv, T, d]`.
        ranges: `Ranges`.
        scores: `Scores`.
        own: `OwnKeys` or `None`.

    Returns:
        float tensor `[N, B, Hkv, C, Q, d]` in the dtype of `query`.
    """
    floats = [query, key, value] + ([] if own is None else [own.key, own.value])
    given, bounds = [ranges.low, ranges.high], None
    if isinstance(ranges.first, np.ndarray) and isinstance(ranges.last, np.ndarray):
        bounds = tuple(map(tuple, (ranges.first.tolist(), ranges.last.tolist())))
    else:
        given += [ranges.first, ranges.last]
    given += [] if own is None else [own.seen]
    given = [ops.convert_to_tensor(tensor) for tensor in given]
    call = _TileCall(scores, own is not None, bounds, (KEY_TILE, LARGE_KEY_TILE))
    return differentiable(_forward, _backward, call, (*floats, *given), len(floats))


class _TileCall(NamedTuple):
    """A call of `tile_attention` without its tensors.

    Attributes:
        scores: `Scores`.
        has_own: bool, whether there are `OwnKeys`.
        bounds: `(first, last)` of `Ranges` as tuples of ints, where they are known
            before any step; `None` where they are tensors.
        key_tiles: keys met at once in a compiled loop, and in one counted in Python.
    """

    scores: Scores
    has_own: bool
    bounds: Any
    key_tiles: tuple

    def unpack(self, tensors):
        """`(query, shared keys, own keys or None)`."""
        query, key, value, *rest = tensors
        own_keys, rest = (rest[:2], rest[2:]) if self.has_own else ((), rest)
        low, high, *rest = rest
        bounds = self.bounds
        if bounds is None:
            bounds, rest = rest[:2], rest[2:]
        ranges = Ranges(low, high, *bounds)
        shared = _KeyTiles(key, value, ranges, *self.key_tiles)
        return query, shared, OwnKeys(*own_keys, *rest) if self.has_own else None


def _forward(call, *tensors):
    return _attend(*call.unpack(tensors), call.scores)


def _backward(call, tensors, outputs, upstream):
    return _attend_gradient(*call.unpack(tensors), call.scores, *outputs, upstream)


def _attend(query, shared, own, scores):
    """`(output, log_normaliser)`, the latter float32 `[N, B, Hkv, C, Q]`."""
    tiles, *shape, width = query.shape

    def attend_tile(index, carry):
        tile = _tile(query, index)
        rows = rows_of(tile)

        def see(start, size, state):
            key, value, seen = shared.at(index, start, size)
            found = ops.where(seen, scores.of(rows, key), HIDDEN_SCORE)
            return _see(state, found, value, query.dtype)

        state = see_own(query, own, index, scores)
        state = shared.for_each_seen(index, see, state)
        output, log_normaliser = finish(state, query.dtype)
        return carry, (
            ops.reshape(output, (*shape, width)),
            ops.reshape(log_normaliser, shape),
        )

    like = (((*shape, width), query.dtype), (tuple(shape), "float32"))
    return scan_tiles(attend_tile, tiles, (), like)[1]


def _attend_gradient(query, shared, own, scores, output, log_normaliser, upstream):
    """Gradients by query, key, value and own key and value.

    With p the weights of a query and `delta = sum(upstream * output)`, the gradient
    by its scores is `p (upstream . value - delta)` (arXiv:2205.14135).
    """
    delta = ops.sum(
        ops.cast(upstream, "float32") * ops.cast(output, "float32"), axis=-1
    )

    def tile_gradient(index, carry):
        tile = Pushed(
            *(_tile(t, index) for t in (query, upstream, log_normaliser, delta))
        )
        rows = tile.rows()

        def see(start, size, gradients):
            by_query, by_key, by_value = rows.gradients(
                *shared.at(index, start, size), scores
            )
            return (
                gradients[0] + by_query,
                _add(gradients[1], by_key, start),
                _add(gradients[2], by_value, start),
            )

        by_query, own_gradients = ops.zeros(rows.query.shape, dtype="float32"), ()
        if own is not None:
            by_query, *own_gradients = tile.gradients(
                _tile(own.key, index), _tile(own.value, index), own.seen, scores
            )
            by_query = rows_of(by_query)
        state = (by_query, *carry)
        by_query, *carry = shared.for_each_seen(index, see, state)
        found = (ops.reshape(by_query, tile.query.shape), *own_gradients)
        return tuple(carry), tuple(ops.cast(g, query.dtype) for g in found)

    stacked = [query] if own is None else [query, own.key, own.value]
    like = tuple((tuple(tensor.shape[1:]), query.dtype) for tensor in stacked)
    zeros = ops.zeros(shared.key.shape, dtype="float32")
    carry, stacked = scan_tiles(tile_gradient, query.shape[0], (zeros, zeros), like)
    shared_gradients = (shared.uncut(ops.cast(g, query.dtype)) for g in carry)
    return (stacked[0], *shared_gradients, *stacked[1:])


class Pushed(NamedTuple):
    """Queries, and what their gradient by scores needs."""

    query: Any
    upstream: Any
    log_normaliser: Any
    delta: Any

    def rows(self):
        """The same with the queries of all groups on one axis."""
        shape = rows_of(self.query).shape[:-1]
        return Pushed(
            rows_of(self.query),
            rows_of(self.upstream),
            ops.reshape(self.log_normaliser, shape),
            ops.reshape(self.delta, shape),
        )

    def gradients(self, key, value, seen, scores):
        """Gradients by query, key and value of one tile of keys, float32."""
        found = scores.of(self.query, key)
        exponent = found - self.log_normaliser[..., None]
        weights = ops.exp(ops.where(seen, exponent, HIDDEN_SCORE))
        change = ops.matmul(self.upstream, ops.swapaxes(value, -1, -2))
        change = weights * (ops.cast(change, "float32") - self.delta[..., None])
        change = ops.cast(change * scores.slope(found), self.query.dtype)
        weights = ops.cast(weights, self.query.dtype)
        products = (
            ops.matmul(change, key),
            ops.einsum("...mk,...md->...kd", change, self.query),
            ops.einsum("...mk,...md->...kd", weights, self.upstream),
        )
        return tuple(ops.cast(product, "float32") for product in products)


class _KeyTiles:
    """Shared keys cut into equal tiles, the last one padded."""

    def __init__(self, key, value, ranges, key_tile, large_key_tile):
        self.length = key.shape[2]
        self.large_size = large_key_tile
        count = -(-self.length // key_tile)
        self.size = -(-self.length // count)
        padding = count * self.size - self.length
        widths = ((0, 0), (0, 0), (0, padding), (0, 0))
        self.key = ops.pad(key, widths) if padding else key
        self.value = ops.pad(value, widths) if padding else value
        self.ranges = ranges

    def for_each_seen(self, index, see, state):
        """Calls `see(start, size, state)` on all keys a tile of queries sees.

        Where tiles are counted in Python, they end where the keys that are seen do.
        """
        first, last = self._bounds(index)
        if isinstance(index, int):
            for start in range(first, last, self.large_size):
                state = see(start, min(self.large_size, last - start), state)
            return state
        size = self.size

        def see_tile(key_index, state):
            return see(key_index * size, size, state)

        return ops.fori_loop(first // size, -(-last // size), see_tile, state)

    def at(self, index, start, size):
        """`(key, value, seen)` of a tile of keys for a tile of queries."""
        place = start + ops.arange(size, dtype="int32")
        low = _tile(self.ranges.low, index)[:, None, :, None]
        high = _tile(self.ranges.high, index)[:, None, :, None]
        seen = ops.logical_and(place >= low, place < high)
        return _cut(self.key, start, size), _cut(self.value, start, size), seen

    def _bounds(self, index):
        bounds = self.ranges.first, self.ranges.last
        if isinstance(index, int):
            return tuple(int(bound[index]) for bound in bounds)
        return tuple(
            _tile(ops.cast(ops.convert_to_tensor(bound), "int32"), index)
            for bound in bounds
        )

    def uncut(self, tensor):
        """`tensor` without the padding of keys."""
        return tensor[:, :, : self.length]


def _cut(tensor, start, size):
    batch, heads, _, width = tensor.shape
    return ops.slice(tensor, (0, 0, start, 0), (batch, heads, size, width))


def _add(total, part, start):
    """`total` with `part` added from key `start` on."""
    part = _cut(total, start, part.shape[2]) + part
    return ops.slice_update(total, (0, 0, start, 0), part)


def see_own(query, own, index, scores):
    """What a tile of queries has seen of its own keys: `(largest, total, output)`."""
    tile = _tile(query, index)
    rows = rows_of(tile)
    if own is None:
        shape = tuple(rows.shape[:-1])
        return (
            ops.full(shape, LOWEST_SCORE, dtype="float32"),
            ops.zeros(shape, dtype="float32"),
            ops.zeros(rows.shape, dtype="float32"),
        )
    found = scores.of(tile, _tile(own.key, index))
    found = ops.where(own.seen, found, HIDDEN_SCORE)
    largest = ops.max(found, axis=-1)
    weights = ops.exp(found - largest[..., None])
    output = ops.matmul(ops.cast(weights, tile.dtype), _tile(own.value, index))
    return (
        ops.reshape(largest, rows.shape[:-1]),
        ops.reshape(ops.sum(weights, axis=-1), rows.shape[:-1]),
        rows_of(ops.cast(output, "float32")),
    )


def _see(state, found, value, dtype):
    """The online softmax: one more tile of scores and the values they weigh."""
    largest, total, output = state
    new_largest = ops.maximum(largest, ops.max(found, axis=-1))
    shrink = ops.exp(largest - new_largest)
    weights = ops.exp(found - new_largest[..., None])
    seen = ops.cast(ops.matmul(ops.cast(weights, dtype), value), "float32")
    return (
        new_largest,
        total * shrink + ops.sum(weights, axis=-1),
        output * shrink[..., None] + seen,
    )


def finish(state, dtype):
    """`(output, log_normaliser)` of the online softmax once all keys were seen."""
    largest, total, output = state
    total = ops.maximum(total, SMALLEST_SUM)
    return ops.cast(output / total[..., None], dtype), largest + ops.log(total)


def rows_of(tile):
    """`[B, Hkv, C, Q, d]` as `[B, Hkv, M, d]`."""
    batch, heads, groups, queries, width = tile.shape
    return ops.reshape(tile, (batch, heads, groups * queries, width))


def _tile(tensor, index):
    if isinstance(index, int):
        return tensor[index]
    shape = tuple(tensor.shape)
    start = (index, *(0 for _ in shape[1:]))
    return ops.reshape(ops.slice(tensor, start, (1, *shape[1:])), shape[1:])
