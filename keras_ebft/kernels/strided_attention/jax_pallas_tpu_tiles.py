"""What the TPU kernels of `strided_attention` share: tiles, and who sees which.

Scores are held transposed, `[keys, rows]`: maxima and sums over keys are plain
additions of registers, and what is kept per row lies along the lanes.
`jax_pallas_ranges` says what rows and ranges are.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels.strided_attention import jax_pallas_ranges as ranges_of

HIDDEN_SCORE = -1e30
# Above what is hidden: a row that has seen nothing yet weighs hidden keys by 0.
LOWEST_MAXIMUM = -1e20
VMEM_LIMIT_BYTES = 32 * 2**20
# Where the ends of each row's ranges stand.
DOCUMENT, OWN = slice(0, 2), slice(2, 4)


class Options(NamedTuple):
    """What a call's kernels are compiled with."""

    scale: float
    soft_cap: float | None
    row_tile: int
    key_tile: int
    own_key_tile: int
    own_tiles: int
    interpret: object


class QueryGrid:
    """Grid `(B, Hkv, row tile, own key tiles and then document key tiles)`.

    Tiles that no row of the row tile sees are neither fetched nor computed.
    """

    def __init__(self, query, own, document, ranges, options):
        batch, heads, rows, width = query.shape
        row_tile, key_tile = options.row_tile, options.key_tile
        own_tiles = options.own_tiles
        document_tiles = document[0].shape[2] // key_tile
        own_seen, _ = ranges_of.tiles_seen(
            ranges[:, 2], ranges[:, 3], row_tile, options.own_key_tile,
            own[0].shape[2] // options.own_key_tile,
        )  # fmt: skip
        document_seen, _ = ranges_of.tiles_seen(
            ranges[:, 0], ranges[:, 1], row_tile, key_tile, document_tiles
        )
        self.seen = (own_seen, document_seen)
        self.grid = (batch, heads, rows // row_tile, own_tiles + document_tiles)

        def own_index(b, h, r, step, own_seen, document_seen):
            return b, h, tile_at(own_seen, b, r, step), 0

        def document_index(b, h, r, step, own_seen, document_seen):
            return b, h, tile_at(document_seen, b, r, step - own_tiles), 0

        own_keys = pl.BlockSpec((None, None, options.own_key_tile, width), own_index)
        document_keys = pl.BlockSpec((None, None, key_tile, width), document_index)
        self.keys = [own_keys, own_keys, document_keys, document_keys]
        self.rows = pl.BlockSpec(
            (None, None, row_tile, width), lambda b, h, r, *_: (b, h, r, 0)
        )
        self.per_row = pl.BlockSpec(
            (None, None, 1, row_tile), lambda b, h, r, *_: (b, h, 0, r)
        )
        shared = ranges.shape[0] == 1
        self.ranges = pl.BlockSpec(
            (None, 4, row_tile), lambda b, h, r, *_: (0 if shared else b, 0, r)
        )

    def spec(self, **specs):
        """The grid with the blocks of a kernel."""
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=self.grid, **specs
        )


def visit_seen_keys(visit, own, document, ranges, options):
    """Calls `visit` for the tile of this grid step, if a row of it sees any key."""
    step = pl.program_id(3)
    parts = (
        (own, OWN, step, step < options.own_tiles),
        (document, DOCUMENT, step - options.own_tiles, None),
    )
    for (seen, key, value), which, step_of_part, within in parts:
        first, end = seen_tiles(seen, pl.program_id(0), pl.program_id(2))
        tile = first + step_of_part
        is_seen = (step_of_part >= 0) & (tile < end)
        is_seen = is_seen if within is None else is_seen & within
        pl.when(is_seen)(functools.partial(visit, tile, key, value, ranges[which, :]))


def scores(tile, key, query, bounds, options):
    """Scores `[keys, rows]` of one tile, and the slope of their cap."""
    scores = dot(key, query, 1, 1) * options.scale
    cap_slope = 1.0
    if options.soft_cap is not None:
        capped = jnp.tanh(scores * (1.0 / options.soft_cap))
        scores = options.soft_cap * capped
        cap_slope = 1.0 - capped * capped
    index = tile * key.shape[0] + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    visible = (index >= bounds[0:1]) & (index < bounds[1:2])
    return jnp.where(visible, scores, HIDDEN_SCORE), cap_slope


def seen_tiles(seen, batch, tile):
    """First tile and the one after the last, of `[2, B or 1, tiles]`."""
    batch = 0 if seen.shape[1] == 1 else batch
    return seen[0, batch, tile], seen[1, batch, tile]


def tile_at(seen, batch, tile, step):
    """The seen tile of a step; where none is, one that is at hand already."""
    first, end = seen_tiles(seen, batch, tile)
    return jnp.clip(first + step, jnp.minimum(first, end - 1), end - 1).clip(0)


def dot(one, two, one_axis, two_axis):
    """Product summed over one axis of each, in float32."""
    axes = (((one_axis,), (two_axis,)), ((), ()))
    return lax.dot_general(one, two, axes, preferred_element_type=jnp.float32)


def compile_options(options):
    """Keyword arguments of every `pallas_call`."""
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        "interpret": options.interpret,
    }
