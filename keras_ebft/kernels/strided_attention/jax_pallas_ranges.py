"""Strided attention as attention to ranges, the form the Pallas kernels take.

All queries that share a key head become rows `[B, Hkv, R, d]`, blocks outermost,
so that neighbouring rows see about the same document keys. Each row sees one
range of the document's keys and one range of the blocks' own keys. Anchors,
starts, windows and offsets are nothing but the ends of these ranges: four
integers per row take the place of a mask.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Shape(NamedTuple):
    """Static sizes of a call.

    Attributes:
        samples: int, n.
        blocks: int, K.
        steps: int, queries of a block and sample, Q.
        own_steps: int, keys of a block and sample, P.
        group: int, query heads per key head.
    """

    samples: int
    blocks: int
    steps: int
    own_steps: int
    group: int

    @classmethod
    def of(cls, query, key):
        """The sizes of `[B, n, K, Q, H, d]` queries and their own keys."""
        _, samples, blocks, steps, heads, _ = query.shape
        return cls(samples, blocks, steps, key.shape[3], heads // key.shape[4])

    @property
    def sequence_rows(self):
        """Rows of one block and sample."""
        return self.steps * self.group

    @property
    def rows(self):
        """All rows of a document and key head, R."""
        return self.samples * self.blocks * self.sequence_rows

    def own_tiles(self, row_tile, key_tile):
        """The most tiles of own keys that the rows of one tile can see."""
        most = 1
        for start in range(0, self.rows, row_tile):
            end = min(start + row_tile, self.rows)
            first = start // self.sequence_rows * self.own_steps
            last = ((end - 1) // self.sequence_rows + 1) * self.own_steps - 1
            most = max(most, last // key_tile - first // key_tile + 1)
        return most


def to_rows(query, key_heads, multiple):
    """`[B, n, K, Q, H, d]` as `[B, Hkv, R, d]`, R padded to a multiple."""
    batch, samples, blocks, steps, heads, width = query.shape
    shape = (batch, samples, blocks, steps, key_heads, heads // key_heads, width)
    rows = jnp.transpose(jnp.reshape(query, shape), (0, 4, 2, 1, 3, 5, 6))
    return _pad_axis(jnp.reshape(rows, (batch, key_heads, -1, width)), multiple)


def from_rows(rows, shape):
    """The inverse of `to_rows`, for queries `[B, n, K, Q, H, d]`."""
    batch, samples, blocks, steps, heads, width = shape
    key_heads = rows.shape[1]
    group = heads // key_heads
    rows = rows[:, :, : blocks * samples * steps * group]
    split = (batch, key_heads, blocks, samples, steps, group, width)
    query = jnp.transpose(jnp.reshape(rows, split), (0, 3, 2, 4, 1, 5, 6))
    return jnp.reshape(query, shape)


def document_keys(keys, multiple):
    """`[B, T, Hkv, d]` as `[B, Hkv, T, d]`, T padded to a multiple."""
    return _pad_axis(jnp.transpose(keys, (0, 2, 1, 3)), multiple)


def row_ranges(
    shape, length, anchors, *, starts, query_offset, sliding_window, multiple
):
    """Which keys each row sees.

    Args:
        shape: `Shape`.
        length: int, document keys, T.
        anchors: int32 array `[K]` or `[B, K]`, or `None` without a document.
        starts: int32 array `[B, K]` or `None`.
        query_offset: int or int scalar array.
        sliding_window: int or `None`.
        multiple: int, rows are padded to a multiple with rows that see nothing.

    Returns:
        int32 array `[B or 1, 4, R]`: first document key and the one after the
        last, first own key and the one after the last.
    """
    step = (query_offset + jnp.arange(shape.steps, dtype=jnp.int32))[:, None]
    anchors = _places(np.zeros(shape.blocks) if anchors is None else anchors)
    starts = jnp.zeros_like(anchors) if starts is None else _places(starts)
    high = jnp.clip(anchors, 0, length)
    low = jnp.maximum(starts, 0)
    own_low = jnp.zeros_like(step)
    if sliding_window is not None:
        low = jnp.maximum(low, anchors + step - sliding_window + 1)
        own_low = jnp.maximum(step - sliding_window + 1, 0)
    own_high = jnp.minimum(step + 1, shape.own_steps)
    sequences = (shape.blocks, shape.samples)
    first_own = np.arange(math.prod(sequences)).reshape(sequences) * shape.own_steps
    first_own = jnp.asarray(first_own[..., None, None], jnp.int32)
    ends = (jnp.minimum(low, high), high, first_own + own_low, first_own + own_high)
    batch = max(anchors.shape[0], starts.shape[0])
    full = (batch, *sequences, shape.steps, shape.group)
    ends = [jnp.broadcast_to(end, full).reshape(batch, 1, -1) for end in ends]
    return _pad_axis(jnp.concatenate(ends, axis=1), multiple, axis=2)


def tiles_seen(low, high, row_tile, key_tile, num_key_tiles):
    """Which key tiles each row tile needs, and the reverse.

    Args:
        low: int32 array `[B, R]`, first key of each row.
        high: int32 array `[B, R]`, the one after the last.
        row_tile: int, rows of a tile; divides R.
        key_tile: int, keys of a tile.
        num_key_tiles: int.

    Returns:
        `(keys, rows)`: int32 arrays `[2, B, row tiles]`, first key tile of a row
        tile and the one after the last, and `[2, B, key tiles]`, first row tile of
        a key tile and the one after the last.
    """
    some = (low < high).reshape(low.shape[0], -1, row_tile)
    low, high = (end.reshape(some.shape) for end in (low, high))
    first = jnp.min(jnp.where(some, low // key_tile, num_key_tiles), axis=-1)
    end = jnp.max(jnp.where(some, (high - 1) // key_tile + 1, 0), axis=-1)
    first = jnp.minimum(first, end)
    tile = jnp.arange(num_key_tiles, dtype=jnp.int32)
    needed = (first[..., None] <= tile) & (tile < end[..., None])
    row = jnp.arange(first.shape[1], dtype=jnp.int32)[:, None]
    row_end = jnp.max(jnp.where(needed, row + 1, 0), axis=1)
    row_first = jnp.min(jnp.where(needed, row, first.shape[1]), axis=1)
    row_first = jnp.minimum(row_first, row_end)
    seen = (jnp.stack([first, end]), jnp.stack([row_first, row_end]))
    return tuple(bounds.astype(jnp.int32) for bounds in seen)


def round_up(number, multiple):
    """The smallest multiple that is not below a number."""
    return -(-number // multiple) * multiple


def _places(places):
    """`[K]` or `[B, K]` integers as `[1 or B, K, 1, 1, 1]`."""
    places = jnp.asarray(places, jnp.int32)
    places = places if places.ndim == 2 else places[None]
    return places[..., None, None, None]


def _pad_axis(array, multiple, axis=2):
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, padding)
