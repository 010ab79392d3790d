"""`strided_attention` in tiles of blocks, each reading keys to its last anchor.

Blocks near the start of a document see little of it: attention of neighbouring
blocks to tiles of keys up to their last anchor does about half the work of attention
to the whole document with a mask.
"""

import numpy as np
from keras import ops

from keras_ebft.kernels.attention_tiles import OwnKeys, Ranges, Scores, tile_attention
from keras_ebft.kernels.strided_attention.reference import strided_attention_reference

# Of this many tiles of blocks, one has to see all keys of the last, and so on: more
# tiles save at most the share 1/(2 * TILES) of the work that is left.
TILES = 8
# Queries per head of keys in a tile: fewer make products too small to run at full
# speed and loops too long, more make scores too large for a cache.
FEWEST_QUERIES = 512
MOST_QUERIES = 1024


def strided_attention_blockwise(
    query,
    key,
    value,
    document_key=None,
    document_value=None,
    anchors=None,
    *,
    scale,
    starts=None,
    query_offset=0,
    sliding_window=None,
    soft_cap=None,
    attend=tile_attention,
    make_ranges=None,
):
    """See `keras_ebft.kernels.strided_attention`.

    `attend` is a `tile_attention`, and `make_ranges` makes what it takes for `Ranges`,
    as `tile_ranges` does.
    """
    if document_key is None:
        return strided_attention_reference(
            query, key, value,
            scale=scale, query_offset=query_offset,
            sliding_window=sliding_window, soft_cap=soft_cap,
        )  # fmt: skip
    step = ops.arange(query.shape[3], dtype="int32") + query_offset
    layout = TileLayout(query.shape, key.shape[-2])
    output = attend(
        layout.queries(query),
        ops.transpose(document_key, (0, 2, 1, 3)),
        ops.transpose(document_value, (0, 2, 1, 3)),
        (make_ranges or tile_ranges)(
            layout, anchors, starts, sliding_window, query_offset
        ),
        Scores(scale, soft_cap),
        OwnKeys(
            layout.own_keys(key),
            layout.own_keys(value),
            layout.each_head(_own_seen(step, key.shape[3], sliding_window)),
        ),
    )
    return layout.blocks(output)


class TileLayout:
    """Blocks `[B, n, K, Q, H, d]` as tiles `[N, B, Hkv, n * k, g * Q, d]`.

    A tile holds k blocks of all samples; g query heads share one head of keys.
    """

    def __init__(self, shape, kv_heads):
        self.shape = tuple(shape)
        _, samples, blocks, queries, heads, _ = self.shape
        self.heads = (kv_heads, heads // kv_heads)
        per_block = samples * (heads // kv_heads) * queries
        wanted = min(max(per_block * blocks // TILES, FEWEST_QUERIES), MOST_QUERIES)
        # Rounded up: rounded down, a tile more would be filled with padding.
        self.tiles = -(-blocks // -(-wanted // per_block))
        self.blocks_per_tile = -(-blocks // self.tiles)
        self.padding = self.tiles * self.blocks_per_tile - blocks
        self.cut = (self.tiles, self.blocks_per_tile)

    def queries(self, query):
        """`[B, n, K, Q, H, d]` as tiles."""
        batch, samples, _, length, _, width = self.shape
        (kv_heads, head_group), size = self.heads, self.blocks_per_tile
        query = ops.reshape(
            self._pad_blocks(query),
            (batch, samples, *self.cut, length, *self.heads, width),
        )
        query = ops.transpose(query, (2, 0, 5, 1, 3, 6, 4, 7))
        return ops.reshape(
            query,
            (self.tiles, batch, kv_heads, samples * size, head_group * length, width),
        )

    def own_keys(self, key):
        """`[B, n, K, P, Hkv, d]` as tiles `[N, B, Hkv, n * k, P, d]`."""
        batch, samples, _, length, heads, width = key.shape
        key = ops.reshape(
            self._pad_blocks(key),
            (batch, samples, *self.cut, length, heads, width),
        )
        key = ops.transpose(key, (2, 0, 5, 1, 3, 4, 6))
        groups = samples * self.blocks_per_tile
        return ops.reshape(key, (self.tiles, batch, heads, groups, length, width))

    def blocks(self, tiles):
        """The inverse of `queries`."""
        batch, samples, blocks, length, heads, width = self.shape
        (kv_heads, head_group), size = self.heads, self.blocks_per_tile
        output = ops.reshape(
            tiles,
            (self.tiles, batch, kv_heads, samples, size, head_group, length, width),
        )
        output = ops.transpose(output, (1, 3, 0, 4, 6, 2, 5, 7))
        whole = self.tiles * self.blocks_per_tile
        output = ops.reshape(output, (batch, samples, whole, length, heads, width))
        return output[:, :, :blocks] if self.padding else output

    def places(self, places):
        """Row indices `[B or 1, K]` as `[N, B or 1, k]`.

        What is padded sees what the last block does: nothing is read of it, and its
        tile has no ends of its own.
        """
        if self.padding:
            last = ops.repeat(places[:, -1:], self.padding, axis=1)
            places = ops.concatenate([places, last], axis=1)
        places = ops.reshape(places, (-1, self.tiles, self.blocks_per_tile))
        return ops.transpose(places, (1, 0, 2))

    def each_query(self, bounds):
        """`[N, B or 1, k, Q or 1]` as `[N, B or 1, M]`."""
        tiles, batch, blocks, _ = bounds.shape
        _, samples, _, length, _, _ = self.shape
        shape = (tiles, batch, samples, blocks, self.heads[1], length)
        bounds = ops.broadcast_to(bounds[:, :, None, :, None, :], shape)
        return ops.reshape(bounds, (tiles, batch, -1))

    def each_head(self, seen):
        """`[Q, P]` as `[g * Q, P]`."""
        return ops.tile(seen, (self.heads[1], 1))

    def _pad_blocks(self, tensor):
        if not self.padding:
            return tensor
        widths = [(0, 0)] * len(tensor.shape)
        widths[2] = (0, self.padding)
        return ops.pad(tensor, widths)


def tile_ranges(layout, anchors, starts, sliding_window, query_offset):
    """`Ranges` of document keys of every query.

    Args:
        layout: `TileLayout`.
        anchors: as `strided_attention` takes them, and all that follows.
        starts: int32 tensor `[B, K]` or `None`.
        sliding_window: int or `None`.
        query_offset: int or int scalar tensor.
    """
    high = layout.places(_per_row(anchors))
    low = ops.zeros_like(high) if starts is None else layout.places(_per_row(starts))
    low, high = low[..., None], high[..., None]
    first, last = ops.min(low, axis=(1, 2, 3)), ops.max(high, axis=(1, 2, 3))
    if sliding_window is not None:
        step = ops.arange(layout.shape[3], dtype="int32") + query_offset
        low = ops.maximum(low, high + step - (sliding_window - 1))
        first = ops.min(low, axis=(1, 2, 3))
    if isinstance(anchors, np.ndarray) and anchors.ndim == 1:
        known = _known_bounds(layout, anchors, sliding_window)
        first, last = known if starts is None else (first, known[1])
    return Ranges(layout.each_query(low), layout.each_query(high), first, last)


def _known_bounds(layout, anchors, sliding_window):
    """First and last key per tile, where anchors are known beforehand."""
    padded = np.pad(anchors, (0, layout.padding), mode="edge")
    tiles = padded.reshape(layout.tiles, layout.blocks_per_tile)
    first = np.zeros(layout.tiles, "int32")
    if sliding_window is not None:
        first = np.maximum(tiles.min(axis=1) - (sliding_window - 1), 0)
    return first.astype("int32"), tiles.max(axis=1).astype("int32")


def _own_seen(step, keys, sliding_window):
    """Which keys of its own block each query sees, bool `[Q, P]`."""
    distance = step[:, None] - ops.arange(keys, dtype="int32")[None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen = ops.logical_and(seen, distance < sliding_window)
    return seen


def _per_row(places):
    places = ops.convert_to_tensor(places, dtype="int32")
    return places if len(places.shape) == 2 else places[None]
