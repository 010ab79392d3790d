"""The backward kernels of `strided_attention` for TPU.

Both recompute softmax weights from the forward pass's log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels.strided_attention import jax_pallas_ranges as ranges_of
from keras_ebft.kernels.strided_attention import jax_pallas_tpu_tiles as tiles


def query_gradient(rows, own, document, ranges, options):
    """Gradient of the queries, summed over all keys that they see."""
    query = rows[0]
    grid = tiles.QueryGrid(query, own, document, ranges, options)
    return pl.pallas_call(
        functools.partial(_query_gradient_kernel, options=options),
        grid_spec=grid.spec(
            in_specs=[
                *[grid.rows, grid.rows, grid.per_row, grid.per_row],
                *grid.keys,
                grid.ranges,
            ],
            out_specs=grid.rows,
            scratch_shapes=[
                pltpu.VMEM((query.shape[-1], options.row_tile), jnp.float32)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        name="strided_attention_query_gradient",
        **tiles.compile_options(options),
    )(*grid.seen, *rows, *own, *document, ranges)


def _query_gradient_kernel(
    own_seen, document_seen, query, upstream, normaliser, delta,
    own_key, own_value, doc_key, doc_value, ranges, gradient, total, *, options,
):  # fmt: skip
    @pl.when(pl.program_id(3) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    rows = (query, upstream, normaliser, delta)

    def visit(tile, key, value, bounds):
        _, slope = _weights_and_slope(tile, key, value, rows, bounds, options)
        total[...] += tiles.dot(key[...], slope.astype(key.dtype), 0, 0)

    tiles.visit_seen_keys(
        visit,
        (own_seen, own_key, own_value),
        (document_seen, doc_key, doc_value),
        ranges,
        options,
    )

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        gradient[...] = total[...].T.astype(gradient.dtype)


def key_gradients(rows, keys_values, ranges, which, key_tile, options):
    """Gradients of keys and values, summed over the row tiles that see them."""
    query, key = rows[0], keys_values[0]
    batch, heads, num_rows, width = query.shape
    row_tile, num_tiles = options.row_tile, key.shape[2] // key_tile
    low, high = (ranges[:, which][:, end] for end in (0, 1))
    _, seen = ranges_of.tiles_seen(low, high, row_tile, key_tile, num_tiles)
    shared = ranges.shape[0] == 1

    def index(b, h, k, step, seen):
        return tiles.tile_at(seen, b, k, step)

    row_block = pl.BlockSpec(
        (None, None, row_tile, width), lambda b, h, *s: (b, h, index(b, h, *s), 0)
    )
    per_row = pl.BlockSpec(
        (None, None, 1, row_tile), lambda b, h, *s: (b, h, 0, index(b, h, *s))
    )
    range_block = pl.BlockSpec(
        (None, 2, row_tile),
        lambda b, h, *s: (0 if shared else b, 0, index(b, h, *s)),
    )
    key_block = pl.BlockSpec(
        (None, None, key_tile, width), lambda b, h, k, *_: (b, h, k, 0)
    )
    return pl.pallas_call(
        functools.partial(_key_gradients_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, num_tiles, num_rows // row_tile),
            in_specs=[
                *[row_block, row_block, per_row, per_row],
                *[key_block, key_block, range_block],
            ],
            out_specs=[key_block, key_block],
            scratch_shapes=[pltpu.VMEM((key_tile, width), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype)] * 2,
        name="strided_attention_key_gradients",
        **tiles.compile_options(options),
    )(seen, *rows, *keys_values, ranges[:, which])


def _key_gradients_kernel(
    seen, query, upstream, normaliser, delta, key, value, ranges,
    key_gradient, value_gradient, key_total, value_total, *, options,
):  # fmt: skip
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        key_total[...] = jnp.zeros_like(key_total)
        value_total[...] = jnp.zeros_like(value_total)

    key_tile = pl.program_id(2)
    first, end = tiles.seen_tiles(seen, pl.program_id(0), key_tile)

    @pl.when(first + step < end)
    def _():
        rows = (query, upstream, normaliser, delta)
        weights, slope = _weights_and_slope(
            key_tile, key, value, rows, ranges[...], options
        )
        value_total[...] += tiles.dot(
            weights.astype(upstream.dtype), upstream[...], 1, 0
        )
        key_total[...] += tiles.dot(slope.astype(query.dtype), query[...], 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        key_gradient[...] = key_total[...].astype(key_gradient.dtype)
        value_gradient[...] = value_total[...].astype(value_gradient.dtype)


def _weights_and_slope(tile, key, value, rows, bounds, options):
    """Softmax weights, and the gradient of the raw scores, `[keys, rows]` each."""
    query, upstream, normaliser, delta = rows
    scores, cap_slope = tiles.scores(tile, key[...], query[...], bounds, options)
    weights = jnp.exp(scores - normaliser[...])
    to_weights = tiles.dot(value[...], upstream[...], 1, 1)
    slope = weights * (to_weights - delta[...]) * (cap_slope * options.scale)
    return weights, slope
