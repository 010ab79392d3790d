"""`linear_logprob` for GPU: Pallas kernels, lowered through Triton.

The forward pass keeps logits in registers. The backward pass writes the logits'
gradient for a bounded number of rows at a time, in the dtype of the head, and
leaves the two products with it to the library's matrix product: accumulators of
`[rows, D]` do not fit into registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_ebft.kernels import jax_pallas_head_gpu as tiles
from keras_ebft.kernels.jax_pallas_gpu_calls import float32_products, gpu_call
from keras_ebft.kernels.jax_pallas_head import HIDDEN_LOGIT, dot

ROW_TILE = 128
VOCABULARY_TILE = 128
# Programs that keep a large GPU busy; with fewer row tiles each one's vocabulary
# is split among several.
PROGRAMS = 256
# Bytes of the logits' gradient that exist at a time.
CHUNK_BYTES = 2**29


class _Options(NamedTuple):
    temperature: float
    soft_cap: float | None
    splits: int
    interpret: bool


def linear_logprob_pallas_gpu(
    hidden, head, labels, *, temperature=1.0, soft_cap=None, interpret=None
):
    """See `keras_ebft.kernels.linear_logprob`.

    Logits are float32 throughout. Products of float32 tensors are as precise as
    `jax_default_matmul_precision` asks and, where it asks nothing, float32.

    `interpret` goes to `pallas_call`; `None` interprets where there is no GPU.
    """
    rows = hidden.shape[0]
    padding = -rows % ROW_TILE
    row_tiles = (rows + padding) // ROW_TILE
    splits = min(-(-PROGRAMS // row_tiles), pl.cdiv(head.shape[0], VOCABULARY_TILE))
    options = _Options(
        float(temperature),
        None if soft_cap is None else float(soft_cap),
        splits,
        tiles.interprets(interpret),
    )
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    hidden, head = tiles.pad_width(hidden, head)
    labels = jnp.pad(labels.astype("int32"), (0, padding))
    log_prob, entropy = _linear_logprob(hidden, head, labels, options)
    return log_prob[:rows], entropy[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_logprob(hidden, head, labels, options):
    return _forward(hidden, head, labels, options)[0]


def _forward(hidden, head, labels, options):
    rows = hidden.shape[0]
    partial = jax.ShapeDtypeStruct((options.splits, rows), jnp.float32)
    highest, total, weighted, chosen = gpu_call(
        functools.partial(_forward_kernel, options=options),
        grid=(rows // ROW_TILE, options.splits),
        out_shape=[partial] * 4,
        name="linear_logprob_forward",
        **tiles.compiler_options(options.interpret),
    )(hidden, head, labels)
    # What the parts of the vocabulary found, as one.
    overall = jnp.max(highest, axis=0)
    share = jnp.exp(highest - overall)
    total = jnp.sum(total * share, axis=0)
    normaliser = overall + jnp.log(total)
    log_prob = jnp.sum(chosen, axis=0) - normaliser
    entropy = normaliser - jnp.sum(weighted * share, axis=0) / total
    residuals = (hidden, head, labels, normaliser, entropy)
    return (log_prob, entropy), residuals


def _forward_kernel(hidden, head, labels, highest, total, weighted, chosen, *, options):
    """Online log-sum-exp, expected logit and the label's logit of a row tile."""
    rows = pl.ds(pl.program_id(0) * ROW_TILE, ROW_TILE)
    split = pl.program_id(1)
    own_labels = labels[rows]

    def add(tile, carry):
        before, total, weighted, chosen = carry
        logits, token = _logits(hidden, head, rows, tile, options)
        now = jnp.maximum(before, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - now[:, None])
        shrink = jnp.exp(before - now)
        is_label = token[None, :] == own_labels[:, None]
        return (
            now,
            total * shrink + jnp.sum(weights, axis=1),
            weighted * shrink + jnp.sum(weights * logits, axis=1),
            chosen + jnp.sum(jnp.where(is_label, logits, 0.0), axis=1),
        )

    zero = jnp.zeros((ROW_TILE,), jnp.float32)
    num_tiles = pl.cdiv(head.shape[0], VOCABULARY_TILE)
    per_split = pl.cdiv(num_tiles, options.splits)
    first = split * per_split
    last = jnp.minimum(first + per_split, num_tiles)
    found = lax.fori_loop(first, last, add, (zero + HIDDEN_LOGIT, zero, zero, zero))
    for ref, value in zip((highest, total, weighted, chosen), found):
        ref[split, rows] = value


def _backward(options, residuals, upstream):
    hidden, head, *per_row = residuals
    per_row = (*per_row, *upstream)
    rows = hidden.shape[0]
    limit = CHUNK_BYTES // (head.shape[0] * head.dtype.itemsize)
    chunk = min(rows, max(limit // ROW_TILE, 1) * ROW_TILE)
    if chunk == rows:
        found = _chunk_gradients(hidden, head, per_row, options)
        return found[0], found[1].astype(head.dtype), None
    num_chunks = pl.cdiv(rows, chunk)
    padding = num_chunks * chunk - rows
    padded = jnp.pad(hidden, ((0, padding), (0, 0)))
    # With an upstream gradient of zero padded rows have none of their own.
    per_row = [jnp.pad(value, (0, padding)) for value in per_row]

    def body(index, carry):
        hidden_gradient, head_gradient = carry
        start = index * chunk
        hidden_part, head_part = _chunk_gradients(
            lax.dynamic_slice_in_dim(padded, start, chunk),
            head,
            [lax.dynamic_slice_in_dim(value, start, chunk) for value in per_row],
            options,
        )
        hidden_gradient = lax.dynamic_update_slice_in_dim(
            hidden_gradient, hidden_part, start, axis=0
        )
        return hidden_gradient, head_gradient + head_part

    start = (jnp.zeros_like(padded), jnp.zeros(head.shape, jnp.float32))
    hidden_gradient, head_gradient = lax.fori_loop(0, num_chunks, body, start)
    return hidden_gradient[:rows], head_gradient.astype(head.dtype), None


_linear_logprob.defvjp(_forward, _backward)


def _chunk_gradients(hidden, head, per_row, options):
    """Gradients of a chunk of rows: `hidden`'s, and its part of `head`'s in float32."""
    rows, vocabulary = hidden.shape[0], head.shape[0]
    slope = gpu_call(
        functools.partial(_logit_gradient_kernel, options=options),
        grid=(rows // ROW_TILE, pl.cdiv(vocabulary, VOCABULARY_TILE)),
        out_shape=jax.ShapeDtypeStruct((rows, vocabulary), head.dtype),
        name="linear_logprob_logit_gradient",
        **tiles.compiler_options(options.interpret),
    )(hidden, head, *per_row)
    with float32_products(head.dtype, options.interpret):
        hidden_gradient = dot(slope, head, 1, 0).astype(hidden.dtype)
        return hidden_gradient, dot(slope, hidden, 0, 0)


def _logit_gradient_kernel(hidden, head, *refs, options):
    """Gradient with respect to uncapped, unscaled logits of one tile.

    d log_prob / dz = onehot - p;  d entropy / dz = -p (log p + entropy).
    """
    *per_row, gradient_ref = refs
    rows = pl.ds(pl.program_id(0) * ROW_TILE, ROW_TILE)
    tile = pl.program_id(1)
    labels, normaliser, entropy, to_log_prob, to_entropy = (
        ref[rows][:, None] for ref in per_row
    )
    logits, token = _logits(hidden, head, rows, tile, options)
    log_probability = logits - normaliser
    probability = jnp.exp(log_probability)
    gradient = jnp.where(token[None, :] == labels, to_log_prob, 0.0)
    gradient -= probability * (to_log_prob + to_entropy * (log_probability + entropy))
    if options.soft_cap is not None:
        # z temperature / cap is the tanh itself.
        capped = logits * (options.temperature / options.soft_cap)
        gradient = gradient * (1.0 - capped * capped)
    gradient = gradient * (1.0 / options.temperature)
    within = token < head.shape[0]
    columns = pl.ds(tile * VOCABULARY_TILE, VOCABULARY_TILE)
    plgpu.store(
        gradient_ref.at[rows, columns],
        gradient.astype(gradient_ref.dtype),
        mask=jnp.broadcast_to(within[None, :], gradient.shape),
    )


def _logits(hidden, head, rows, tile, options):
    columns = pl.ds(tile * VOCABULARY_TILE, VOCABULARY_TILE)
    return tiles.logits_tile(hidden, head, rows, columns, options)
