"""`strided_attention` for GPU in Pallas, lowered through Triton, with its backward.

`jax_pallas_ranges` says what rows and ranges are. Each program owns a tile of
rows (or of keys, for their gradients) and loops over the tiles it has to see.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_ebft.kernels.jax_pallas_gpu_calls import gpu_call
from keras_ebft.kernels.strided_attention import jax_pallas_ranges as ranges_of

HIDDEN_SCORE = -1e30
# Above what is hidden: a row that has seen nothing yet weighs hidden keys by 0.
LOWEST_MAXIMUM = -1e20
# Rows of a tile, keys of a tile, warps and stages, by the bytes of a query. Compiled
# for capability 8.0 and 9.0 they fit into 99 KiB of shared memory, which the smallest
# devices of either generation have.
TILES = {
    128: (64, 64, 4, 2),
    256: (64, 64, 8, 2),
    512: (32, 32, 8, 2),
    1024: (16, 16, 4, 1),
}
DOCUMENT, OWN = 0, 2


class _Options(NamedTuple):
    scale: float
    soft_cap: float | None
    row_tile: int
    key_tile: int
    warps: int
    stages: int
    interpret: bool

    def compiler_options(self):
        return {
            "compiler_params": plgpu.CompilerParams(
                num_warps=self.warps, num_stages=self.stages
            ),
            "interpret": self.interpret,
        }


def strided_attention_pallas_gpu(
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
    `jax_default_matmul_precision` asks and, where it asks nothing, float32.

    `interpret` goes to `pallas_call`; `None` interprets where there is no GPU.
    """
    shape = ranges_of.Shape.of(query, key)
    key_heads, width = key.shape[4:]
    if document_key is None:
        document_key = jnp.zeros((query.shape[0], 1, key_heads, width), query.dtype)
        document_value = document_key
    # Tiles have powers of two on all sides.
    padded_width = max(16, 2 ** (width - 1).bit_length())
    tiles = TILES[max(128, padded_width * query.dtype.itemsize)]
    row_tile, key_tile = tiles[:2]
    options = _Options(
        float(scale),
        None if soft_cap is None else float(soft_cap),
        *tiles,
        jax.default_backend() != "gpu" if interpret is None else interpret,
    )
    ranges = ranges_of.row_ranges(
        shape,
        document_key.shape[1],
        anchors,
        starts=starts,
        query_offset=query_offset,
        sliding_window=sliding_window,
        multiple=row_tile,
    )

    def widen(tensor):
        padding = [(0, 0)] * (tensor.ndim - 1) + [(0, padded_width - width)]
        return jnp.pad(tensor, padding)

    output = _range_attention(
        ranges_of.to_rows(widen(query), key_heads, row_tile),
        ranges_of.to_rows(widen(key), key_heads, key_tile),
        ranges_of.to_rows(widen(value), key_heads, key_tile),
        ranges_of.document_keys(widen(document_key), key_tile),
        ranges_of.document_keys(widen(document_value), key_tile),
        ranges,
        options,
    )
    return ranges_of.from_rows(output[..., :width], query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _range_attention(query, key, value, doc_key, doc_value, ranges, options):
    return _forward(query, key, value, doc_key, doc_value, ranges, options)[0]


def _forward(query, key, value, doc_key, doc_value, ranges, options):
    parts = ((doc_key, doc_value), (key, value))
    seen = _tiles_of_rows(parts, ranges, options)
    output, normaliser = gpu_call(
        functools.partial(_forward_kernel, options=options),
        grid=_grid(query, options.row_tile),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ],
        name="strided_attention_forward",
        **options.compiler_options(),
    )(query, doc_key, doc_value, key, value, ranges, *seen)
    residuals = (query, key, value, doc_key, doc_value, ranges, output, normaliser)
    return output, residuals


def _forward_kernel(
    query, doc_key, doc_value, key, value, ranges, doc_seen, own_seen,
    output, normaliser, *, options,
):  # fmt: skip
    tile, head, batch = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(tile * options.row_tile, options.row_tile)
    own_query = query[batch, head, rows, :]

    def visit(part, keys, values, key_tile, carry):
        weighed, highest, total = carry
        columns = _columns(key_tile, options)
        bounds = _bounds(ranges, batch, part, rows)
        scores, _ = _scores(
            key_tile, own_query, keys[batch, head, columns, :], bounds, options
        )
        now = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - now[:, None])
        shrink = jnp.exp(highest - now)
        found = values[batch, head, columns, :]
        found = _dot(weights.astype(found.dtype), found, 1, 0)
        total = total * shrink + jnp.sum(weights, axis=1)
        return weighed * shrink[:, None] + found, now, total

    zero = jnp.zeros((options.row_tile,), jnp.float32)
    carry = (jnp.zeros(own_query.shape, jnp.float32), zero + LOWEST_MAXIMUM, zero)
    for part, keys, values, seen in (
        (OWN, key, value, own_seen),
        (DOCUMENT, doc_key, doc_value, doc_seen),
    ):
        first, end = _seen(seen, batch, tile)
        carry = lax.fori_loop(
            first, end, functools.partial(visit, part, keys, values), carry
        )
    weighed, highest, total = carry
    # Rows of padding have seen nothing.
    total = jnp.maximum(total, 1e-30)
    output[batch, head, rows, :] = (weighed / total[:, None]).astype(output.dtype)
    normaliser[batch, head, rows] = highest + jnp.log(total)


def _backward(options, residuals, upstream):
    query, key, value, doc_key, doc_value, ranges, output, normaliser = residuals
    weighed = output.astype(jnp.float32) * upstream.astype(jnp.float32)
    rows = (query, upstream, normaliser, jnp.sum(weighed, axis=-1))
    document, own = (doc_key, doc_value), (key, value)
    query_gradient = gpu_call(
        functools.partial(_query_gradient_kernel, options=options),
        grid=_grid(query, options.row_tile),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        name="strided_attention_query_gradient",
        **options.compiler_options(),
    )(
        *rows, *document, *own, ranges,
        *_tiles_of_rows((document, own), ranges, options),
    )  # fmt: skip
    return (
        query_gradient,
        *_key_gradients(rows, own, ranges, OWN, options),
        *_key_gradients(rows, document, ranges, DOCUMENT, options),
        None,
    )


_range_attention.defvjp(_forward, _backward)


def _query_gradient_kernel(
    query, upstream, normaliser, delta, doc_key, doc_value, key, value, ranges,
    doc_seen, own_seen, gradient, *, options,
):  # fmt: skip
    tile, head, batch = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(tile * options.row_tile, options.row_tile)
    own_rows = _rows((query, upstream, normaliser, delta), batch, head, rows)

    def visit(part, keys, values, key_tile, total):
        columns = _columns(key_tile, options)
        keys = keys[batch, head, columns, :]
        values = values[batch, head, columns, :]
        bounds = _bounds(ranges, batch, part, rows)
        _, slope = _weights_and_slope(key_tile, own_rows, keys, values, bounds, options)
        return total + _dot(slope.astype(keys.dtype), keys, 1, 0)

    total = jnp.zeros(own_rows[0].shape, jnp.float32)
    for part, keys, values, seen in (
        (OWN, key, value, own_seen),
        (DOCUMENT, doc_key, doc_value, doc_seen),
    ):
        first, end = _seen(seen, batch, tile)
        total = lax.fori_loop(
            first, end, functools.partial(visit, part, keys, values), total
        )
    gradient[batch, head, rows, :] = total.astype(gradient.dtype)


def _key_gradients(rows, keys_values, ranges, part, options):
    """Gradients of keys and values, summed over the row tiles that see them."""
    key = keys_values[0]
    _, seen = _tiles(ranges, part, key, options)
    return gpu_call(
        functools.partial(_key_gradients_kernel, part=part, options=options),
        grid=_grid(key, options.key_tile),
        out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype)] * 2,
        name="strided_attention_key_gradients",
        **options.compiler_options(),
    )(*rows, *keys_values, ranges, seen)


def _key_gradients_kernel(
    query, upstream, normaliser, delta, key, value, ranges, seen,
    key_gradient, value_gradient, *, part, options,
):  # fmt: skip
    tile, head, batch = (pl.program_id(axis) for axis in range(3))
    columns = _columns(tile, options)
    keys, values = (ref[batch, head, columns, :] for ref in (key, value))

    def visit(row_tile, carry):
        key_total, value_total = carry
        rows = pl.ds(row_tile * options.row_tile, options.row_tile)
        own_rows = _rows((query, upstream, normaliser, delta), batch, head, rows)
        bounds = _bounds(ranges, batch, part, rows)
        weights, slope = _weights_and_slope(
            tile, own_rows, keys, values, bounds, options
        )
        own_query, own_upstream, *_ = own_rows
        value_part = _dot(weights.astype(own_upstream.dtype), own_upstream, 0, 0)
        key_part = _dot(slope.astype(own_query.dtype), own_query, 0, 0)
        return key_total + key_part, value_total + value_part

    first, end = _seen(seen, batch, tile)
    zero = jnp.zeros(keys.shape, jnp.float32)
    totals = lax.fori_loop(first, end, visit, (zero, zero))
    for ref, total in zip((key_gradient, value_gradient), totals):
        ref[batch, head, columns, :] = total.astype(ref.dtype)


def _weights_and_slope(tile, rows, keys, values, bounds, options):
    """Softmax weights, and the gradient of the raw scores, `[rows, keys]` each."""
    query, upstream, normaliser, delta = rows
    scores, cap_slope = _scores(tile, query, keys, bounds, options)
    weights = jnp.exp(scores - normaliser[:, None])
    to_weights = _dot(upstream, values, 1, 1)
    slope = weights * (to_weights - delta[:, None]) * (cap_slope * options.scale)
    return weights, slope


def _scores(tile, query, keys, bounds, options):
    """Scores `[rows, keys]` of one tile, and the slope of their cap."""
    scores = _dot(query, keys, 1, 1) * options.scale
    cap_slope = 1.0
    if options.soft_cap is not None:
        capped = jnp.tanh(scores * (1.0 / options.soft_cap))
        scores = options.soft_cap * capped
        cap_slope = 1.0 - capped * capped
    index = tile * options.key_tile + jnp.arange(options.key_tile, dtype=jnp.int32)
    low, high = bounds
    visible = (index >= low[:, None]) & (index < high[:, None])
    return jnp.where(visible, scores, HIDDEN_SCORE), cap_slope


def _tiles(ranges, part, key, options):
    """`tiles_seen` of the document's or the blocks' own keys."""
    return ranges_of.tiles_seen(
        ranges[:, part],
        ranges[:, part + 1],
        options.row_tile,
        options.key_tile,
        key.shape[2] // options.key_tile,
    )


def _tiles_of_rows(parts, ranges, options):
    return [
        _tiles(ranges, part, keys_values[0], options)[0]
        for part, keys_values in zip((DOCUMENT, OWN), parts)
    ]


def _grid(array, tile):
    batch, heads, length, _ = array.shape
    return (length // tile, heads, batch)


def _rows(refs, batch, head, rows):
    """Queries, upstream gradients, normalisers and deltas of a row tile."""
    *matrices, normaliser, delta = refs
    return (
        *(ref[batch, head, rows, :] for ref in matrices),
        normaliser[batch, head, rows],
        delta[batch, head, rows],
    )


def _columns(tile, options):
    return pl.ds(tile * options.key_tile, options.key_tile)


def _bounds(ranges, batch, part, rows):
    batch = 0 if ranges.shape[0] == 1 else batch
    return ranges[batch, part, rows], ranges[batch, part + 1, rows]


def _seen(seen, batch, tile):
    """First tile and the one after the last, of `[2, B or 1, tiles]`."""
    batch = 0 if seen.shape[1] == 1 else batch
    return seen[0, batch, tile], seen[1, batch, tile]


def _dot(one, two, one_axis, two_axis):
    """Product summed over one axis of each, in float32."""
    axes = (((one_axis,), (two_axis,)), ((), ()))
    return lax.dot_general(one, two, axes, preferred_element_type=jnp.float32)
