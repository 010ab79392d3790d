"""`strided_attention` for TPU in Pallas: what JAX calls, and the forward kernel."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels.strided_attention import jax_pallas_ranges as ranges_of
from keras_ebft.kernels.strided_attention import jax_pallas_tpu_backward as backward
from keras_ebft.kernels.strided_attention import jax_pallas_tpu_tiles as tiles

LANES = 128
MAX_ROW_TILE = 512
KEY_TILE = 512
OWN_KEY_TILE = LANES
# Own keys that a row tile is tested against, however few each row sees.
OWN_KEYS_PER_TILE = 256


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
    options = tiles.Options(
        float(scale),
        None if soft_cap is None else float(soft_cap),
        row_tile,
        key_tile,
        OWN_KEY_TILE,
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
    query_gradient = backward.query_gradient(rows, own, document, ranges, options)
    own_gradients = backward.key_gradients(
        rows, own, ranges, tiles.OWN, options.own_key_tile, options
    )
    document_gradients = backward.key_gradients(
        rows, document, ranges, tiles.DOCUMENT, options.key_tile, options
    )
    return (query_gradient, *own_gradients, *document_gradients, None)


_range_attention.defvjp(_forward, _backward)


def _forward_call(query, own, document, ranges, options):
    batch, heads, rows, width = query.shape
    grid = tiles.QueryGrid(query, own, document, ranges, options)
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
        **tiles.compile_options(options),
    )(*grid.seen, query, *own, *document, ranges)


def _forward_kernel(
    own_seen, document_seen, query, own_key, own_value, doc_key, doc_value, ranges,
    output, normaliser, weighed, highest, total, *, options,
):  # fmt: skip
    @pl.when(pl.program_id(3) == 0)
    def _():
        weighed[...] = jnp.zeros_like(weighed)
        total[...] = jnp.zeros_like(total)
        highest[...] = jnp.full_like(highest, tiles.LOWEST_MAXIMUM)

    def visit(tile, key, value, bounds):
        scores, _ = tiles.scores(tile, key[...], query[...], bounds, options)
        before = highest[...]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - now)
        shrink = jnp.exp(before - now)
        highest[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        found = tiles.dot(value[...], weights.astype(value.dtype), 0, 0)
        weighed[...] = weighed[...] * shrink + found

    tiles.visit_seen_keys(
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
