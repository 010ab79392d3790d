"""`causal_attention` in tiles of queries, each reading keys up to its last query."""

import numpy as np
from keras import ops

from keras_ebft.kernels.attention_tiles import Ranges, Scores, tile_attention

# Tokens of one tile of queries.
QUERY_TILE = 256


def causal_attention_blockwise(
    query, key, value, *, scale, starts=None, sliding_window=None, soft_cap=None
):
    """See `keras_ebft.kernels.causal_attention`."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    head_group = heads // kv_heads
    tiles = -(-length // QUERY_TILE)
    size = -(-length // tiles)
    padding = tiles * size - length

    query = ops.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    query = ops.reshape(query, (batch, tiles, size, kv_heads, head_group, width))
    query = ops.transpose(query, (1, 0, 3, 4, 2, 5))
    rows = head_group * size
    output = tile_attention(
        ops.reshape(query, (tiles, batch, kv_heads, 1, rows, width)),
        ops.transpose(key, (0, 2, 1, 3)),
        ops.transpose(value, (0, 2, 1, 3)),
        _ranges(starts, tiles, size, length, head_group, sliding_window),
        Scores(scale, soft_cap),
    )
    output = ops.reshape(output, (tiles, batch, kv_heads, head_group, size, width))
    output = ops.transpose(output, (1, 0, 4, 2, 3, 5))
    output = ops.reshape(output, (batch, tiles * size, heads, width))
    return output[:, :length] if padding else output


def _ranges(starts, tiles, size, length, head_group, sliding_window):
    """`Ranges` of keys of every query; queries of the padding see the last key."""
    place = np.minimum(np.arange(tiles * size), length - 1).astype("int32")
    known_low = np.zeros_like(place)
    if sliding_window is not None:
        known_low = np.maximum(place - (sliding_window - 1), 0)
    high = place + 1
    first = known_low.reshape(tiles, size).min(axis=1)
    last = high.reshape(tiles, size).max(axis=1)
    low = ops.convert_to_tensor(known_low)[None]
    if starts is not None:
        starts = ops.pad(starts, ((0, 0), (0, tiles * size - length)))
        low = ops.maximum(low, starts)
        first = ops.min(ops.reshape(low, (-1, tiles, size)), axis=(0, 2))
        last = ops.convert_to_tensor(last)

    def each_query(bounds):
        bounds = ops.reshape(bounds, (-1, tiles, 1, size))
        bounds = ops.tile(ops.transpose(bounds, (1, 0, 2, 3)), (1, 1, head_group, 1))
        return ops.reshape(bounds, (tiles, -1, head_group * size))

    high = ops.convert_to_tensor(high)[None]
    return Ranges(each_query(low), each_query(high), first, last)
