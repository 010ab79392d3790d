"""`strided_attention` for TPU in Pallas, forward and backward.

Scores are held transposed, `[keys, rows]`: maxima and sums over keys are plain
additions of registers, and what is kept per row lies along the lanes.
`jax_pallas_ranges` says what rows and ranges are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels.strided_attention import jax_pallas_ranges as ranges_of

HIDDEN_SCORE = -1e30
# Above what is hidden: a row that has seen nothing yet weighs hidden keys by 0.
LOWEST_MAXIMUM = -1e20
LANES = 128
MAX_ROW_TILE = 512
KEY_TILE = 512
OWN_KEY_TILE = LANES
# Own keys that a row tile is tested against, however few each row sees.
OWN_KEYS_PER_TILE = 256
VMEM_LIMIT_BYTES = 32 * 2**20


class _Options(NamedTuple):
    scale: float
    soft_cap: float | None
    row_tile: int
    key_tile: int
    own_tiles: int
    interpret: object


def strided_attention_pallas_tpu(
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
    interpret=None,
):
    """See `keras_ebft.kernels.strided_attention`.

    Scores are float32 throughout. Products of float32 tensors are as precise as
    `jax_default_matmul_precision` asks, as they are everywhere in JAX.

    `interpret` goes to `pallas_call`; `None` interprets where there is no TPU.
    """
    shape = ranges_of.Shape.of(query, key)
    key_heads = key.shape[4]
    if document_key is None:
        batch, width = query.shape[0], query.shape[-1]
        document_key = jnp.zeros((batch, 1, key_heads, width), query.dtype)
        document_value = document_key
    length = document_key.shape[1]
    row_tile = _row_tile(shape)
    key_tile = min(KEY_TILE, ranges_of.round_up(length, LANES))
    ranges = ranges_of.row_ranges(
        shape,
        length,
        anchors,
        starts=starts,
        query_offset=query_offset,
        sliding_window=sliding_window,
        multiple=row_tile,
    )
    options = _Options(
        float(scale),
        None if soft_cap is None else float(soft_cap),
        row_tile,
        key_tile,
        shape.own_tiles(row_tile, OWN_KEY_TILE),
        jax.default_backend() != "tpu" if interpret is None else interpret,
    )
    output = _range_attention(
        ranges_of.to_rows(query, key_heads, row_tile),
        ranges_of.to_rows(key, key_heads, OWN_KEY_TILE),
        ranges_of.to_rows(value, key_heads, OWN_KEY_TILE),
        ranges_of.document_keys(document_key, key_tile),
        ranges_of.document_keys(document_value, key_tile),
        ranges,
        options,
    )
    return ranges_of.from_rows(output, query.shape)


def _row_tile(shape):
    """Rows of a tile: many, but not so many that own keys are most of the work."""
    sequences = max(OWN_KEYS_PER_TILE // shape.own_steps, 1)
    fitting = min(sequences * shape.sequence_rows, shape.rows, MAX_ROW_TILE)
    return max(LANES, 2 ** (fitting.bit_length() - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _range_attention(query, key, value, doc_key, doc_value, ranges, options):
    return _forward(query, key, value, doc_key, doc_value, ranges, options)[0]


def _forward(query, key, value, doc_key, doc_value, ranges, options):
    output, normaliser = _forward_call(
        query, (key, value), (doc_key, doc_value), ranges, options
    )
    residuals = (query, key, value, doc_key, doc_value, ranges, output, normaliser)
    return output, residuals


def _backward(options, residuals, upstream):
    query, key, value, doc_key, doc_value, ranges, output, normaliser = residuals
    weighed = output.astype(jnp.float32) * upstream.astype(jnp.float32)
    per_row = (normaliser, jnp.sum(weighed, axis=-1)[:, :, None])
    own, document = (key, value), (doc_key, doc_value)
    rows = (query, upstream, *per_row)
    query_gradient = _query_gradient_call(rows, own, document, ranges, options)
    own_gradients = _key_gradients_call(
        rows, own, ranges, _Own.range, OWN_KEY_TILE, options
    )
    document_gradients = _key_gradients_call(
        rows, document, ranges, _Document.range, options.key_tile, options
    )
    return (query_gradient, *own_gradients, *document_gradients, None)


_range_attention.defvjp(_forward, _backward)


class _Document:
    range = slice(0, 2)


class _Own:
    range = slice(2, 4)


def _forward_call(query, own, document, ranges, options):
    batch, heads, rows, width = query.shape
    grid = _QueryGrid(query, own, document, ranges, options)
    return pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid_spec=grid.spec(
            in_specs=[grid.rows, *grid.keys, grid.ranges],
            out_specs=[grid.rows, grid.per_row],
            scratch_shapes=[
                pltpu.VMEM((width, options.row_tile), jnp.float32),
                pltpu.VMEM((1, options.row_tile), jnp.float32),
                pltpu.VMEM((1, options.row_tile), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, rows), jnp.float32),
        ],
        name="strided_attention_forward",
        **_compile_options(options),
    )(*grid.seen, query, *own, *document, ranges)


def _forward_kernel(
    own_seen, document_seen, query, own_key, own_value, doc_key, doc_value, ranges,
    output, normaliser, weighed, highest, total, *, options,
):  # fmt: skip
    @pl.when(pl.program_id(3) == 0)
    def _():
        weighed[...] = jnp.zeros_like(weighed)
        total[...] = jnp.zeros_like(total)
        highest[...] = jnp.full_like(highest, LOWEST_MAXIMUM)

    def visit(tile, key, value, bounds):
        scores, _ = _scores(tile, key[...], query[...], bounds, options)
        before = highest[...]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - now)
        shrink = jnp.exp(before - now)
        highest[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        found = _dot(value[...], weights.astype(value.dtype), 0, 0)
        weighed[...] = weighed[...] * shrink + found

    _visit_seen_keys(
        visit,
        (own_seen, own_key, own_value),
        (document_seen, doc_key, doc_value),
        ranges,
        options,
    )

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        # Rows of padding have seen nothing.
        divisor = jnp.maximum(total[...], 1e-30)
        output[...] = (weighed[...] / divisor).T.astype(output.dtype)
        normaliser[...] = highest[...] + jnp.log(divisor)


def _query_gradient_call(rows, own, document, ranges, options):
    query = rows[0]
    grid = _QueryGrid(query, own, document, ranges, options)
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
        **_compile_options(options),
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
        total[...] += _dot(key[...], slope.astype(key.dtype), 0, 0)

    _visit_seen_keys(
        visit,
        (own_seen, own_key, own_value),
        (document_seen, doc_key, doc_value),
        ranges,
        options,
    )

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        gradient[...] = total[...].T.astype(gradient.dtype)


def _visit_seen_keys(visit, own, document, ranges, options):
    """Calls `visit` for the tile of this grid step, if a row of it sees any key."""
    step = pl.program_id(3)
    parts = (
        (own, _Own.range, step, step < options.own_tiles),
        (document, _Document.range, step - options.own_tiles, None),
    )
    for (seen, key, value), which, step_of_part, within in parts:
        first, end = _seen(seen, pl.program_id(0), pl.program_id(2))
        tile = first + step_of_part
        is_seen = (step_of_part >= 0) & (tile < end)
        is_seen = is_seen if within is None else is_seen & within
        pl.when(is_seen)(functools.partial(visit, tile, key, value, ranges[which, :]))


class _QueryGrid:
    """Grid `(B, Hkv, row tile, own key tiles and then document key tiles)`.

    Tiles that no row of the row tile sees are neither fetched nor computed.
    """

    def __init__(self, query, own, document, ranges, options):
        batch, heads, rows, width = query.shape
        row_tile, key_tile = options.row_tile, options.key_tile
        own_tiles = options.own_tiles
        document_tiles = document[0].shape[2] // key_tile
        own_seen, _ = ranges_of.tiles_seen(
            ranges[:, 2], ranges[:, 3], row_tile, OWN_KEY_TILE,
            own[0].shape[2] // OWN_KEY_TILE,
        )  # fmt: skip
        document_seen, _ = ranges_of.tiles_seen(
            ranges[:, 0], ranges[:, 1], row_tile, key_tile, document_tiles
        )
        self.seen = (own_seen, document_seen)
        self.grid = (batch, heads, rows // row_tile, own_tiles + document_tiles)

        def own_index(b, h, r, step, own_seen, document_seen):
            return b, h, _tile_at(own_seen, b, r, step), 0

        def document_index(b, h, r, step, own_seen, document_seen):
            return b, h, _tile_at(document_seen, b, r, step - own_tiles), 0

        own_keys = pl.BlockSpec((None, None, OWN_KEY_TILE, width), own_index)
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
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=self.grid, **specs
        )


def _key_gradients_call(rows, keys_values, ranges, which, key_tile, options):
    """Gradients of keys and values, summed over the row tiles that see them."""
    query, key = rows[0], keys_values[0]
    batch, heads, num_rows, width = query.shape
    row_tile, num_tiles = options.row_tile, key.shape[2] // key_tile
    low, high = (ranges[:, which][:, end] for end in (0, 1))
    _, seen = ranges_of.tiles_seen(low, high, row_tile, key_tile, num_tiles)
    shared = ranges.shape[0] == 1

    def index(b, h, k, step, seen):
        return _tile_at(seen, b, k, step)

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
        **_compile_options(options),
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
    first, end = _seen(seen, pl.program_id(0), key_tile)

    @pl.when(first + step < end)
    def _():
        rows = (query, upstream, normaliser, delta)
        weights, slope = _weights_and_slope(
            key_tile, key, value, rows, ranges[...], options
        )
        value_total[...] += _dot(weights.astype(upstream.dtype), upstream[...], 1, 0)
        key_total[...] += _dot(slope.astype(query.dtype), query[...], 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        key_gradient[...] = key_total[...].astype(key_gradient.dtype)
        value_gradient[...] = value_total[...].astype(value_gradient.dtype)


def _weights_and_slope(tile, key, value, rows, bounds, options):
    """Softmax weights, and the gradient of the raw scores, `[keys, rows]` each."""
    query, upstream, normaliser, delta = rows
    scores, cap_slope = _scores(tile, key[...], query[...], bounds, options)
    weights = jnp.exp(scores - normaliser[...])
    to_weights = _dot(value[...], upstream[...], 1, 1)
    slope = weights * (to_weights - delta[...]) * (cap_slope * options.scale)
    return weights, slope


def _scores(tile, key, query, bounds, options):
    """Scores `[keys, rows]` of one tile, and the slope of their cap."""
    scores = _dot(key, query, 1, 1) * options.scale
    cap_slope = 1.0
    if options.soft_cap is not None:
        capped = jnp.tanh(scores * (1.0 / options.soft_cap))
        scores = options.soft_cap * capped
        cap_slope = 1.0 - capped * capped
    index = tile * key.shape[0] + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    visible = (index >= bounds[0:1]) & (index < bounds[1:2])
    return jnp.where(visible, scores, HIDDEN_SCORE), cap_slope


def _seen(seen, batch, tile):
    """First tile and the one after the last, of `[2, B or 1, tiles]`."""
    batch = 0 if seen.shape[1] == 1 else batch
    return seen[0, batch, tile], seen[1, batch, tile]


def _tile_at(seen, batch, tile, step):
    """The seen tile of a step; where none is, one that is at hand already."""
    first, end = _seen(seen, batch, tile)
    return jnp.clip(first + step, jnp.minimum(first, end - 1), end - 1).clip(0)


def _dot(one, two, one_axis, two_axis):
    """Product summed over one axis of each, in float32."""
    axes = (((one_axis,), (two_axis,)), ((), ()))
    return lax.dot_general(one, two, axes, preferred_element_type=jnp.float32)


def _compile_options(options):
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        "interpret": options.interpret,
    }
