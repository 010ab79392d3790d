"""`linear_logprob` for TPU: a Pallas kernel that keeps logits on the chip.

`jax_pallas_head_tpu` says how tiles of logits are held.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels import jax_pallas_head_tpu as tiles
from keras_ebft.kernels.jax_pallas_head import HIDDEN_LOGIT, dot


def linear_logprob_pallas_tpu(
    hidden, head, labels, *, temperature=1.0, soft_cap=None, interpret=None
):
    """See `keras_ebft.kernels.linear_logprob`.

    Logits are float32 throughout. Products of float32 tensors are as precise as
    `jax_default_matmul_precision` asks, as they are everywhere in JAX.

    `interpret` goes to `pallas_call`; `None` interprets where there is no TPU.
    """
    rows = hidden.shape[0]
    options = tiles.make_options(hidden, head, temperature, soft_cap, interpret)
    padding = tiles.round_up(rows, options.row_tile) - rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    labels = jnp.pad(labels.astype("int32"), (0, padding))
    log_prob, entropy = _linear_logprob(hidden, head, labels[None], options)
    return log_prob[0, :rows], entropy[0, :rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_logprob(hidden, head, labels, options):
    return _forward(hidden, head, labels, options)[0]


def _forward(hidden, head, labels, options):
    log_prob, entropy, normaliser = _forward_call(hidden, head, labels, options)
    residuals = (hidden, head, labels, normaliser, entropy)
    return (log_prob, entropy), residuals


def _backward(options, residuals, upstream):
    hidden, head, *per_row = residuals
    per_row = (*per_row, *upstream)
    hidden_gradient = _hidden_gradient_call(hidden, head, per_row, options)
    head_gradient = _head_gradient_call(hidden, head, per_row, options)
    return hidden_gradient, head_gradient, None


_linear_logprob.defvjp(_forward, _backward)


def _forward_call(hidden, head, labels, options):
    rows, width = hidden.shape
    row = pl.BlockSpec((1, options.row_tile), lambda r, v: (0, r))
    return pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid=(rows // options.row_tile, options.num_vocabulary_tiles),
        in_specs=[
            row,
            pl.BlockSpec((options.row_tile, width), lambda r, v: (r, 0)),
            pl.BlockSpec((options.vocabulary_tile, width), lambda r, v: (v, 0)),
        ],
        out_specs=[row] * 3,
        out_shape=[jax.ShapeDtypeStruct((1, rows), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((1, options.row_tile), jnp.float32)] * 4,
        name="linear_logprob_forward",
        **options.compiler_options("parallel", "arbitrary"),
    )(labels, hidden, head)


def _forward_kernel(
    labels, hidden, head, log_prob, entropy, normaliser,
    highest, total, weighted, chosen, *, options,
):  # fmt: skip
    """Online log-sum-exp, expected logit and the label's logit of a row tile."""
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        highest[...] = jnp.full_like(highest, HIDDEN_LOGIT)
        for sum_so_far in (total, weighted, chosen):
            sum_so_far[...] = jnp.zeros_like(sum_so_far)

    def add(ragged):
        token = tiles.tokens_of(tile, options)
        logits = tiles.logits_tile(hidden[...], head[...], options)
        if ragged:
            logits = jnp.where(token < options.vocabulary, logits, HIDDEN_LOGIT)
        before = highest[...]
        now = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
        weights = jnp.exp(logits - now)
        shrink = jnp.exp(before - now)
        highest[...] = now
        total[...] = total[...] * shrink + _sum(weights)
        weighted[...] = weighted[...] * shrink + _sum(weights * logits)
        chosen[...] += _sum(jnp.where(token == labels[...], logits, 0.0))

    tiles.for_last_and_others(tile, add, options)

    @pl.when(tile == options.num_vocabulary_tiles - 1)
    def _():
        normaliser[...] = highest[...] + jnp.log(total[...])
        log_prob[...] = chosen[...] - normaliser[...]
        entropy[...] = normaliser[...] - weighted[...] / total[...]


def _hidden_gradient_call(hidden, head, per_row, options):
    rows, width = hidden.shape
    row = pl.BlockSpec((1, options.row_tile), lambda r, v: (0, r))
    hidden_tile = pl.BlockSpec((options.row_tile, width), lambda r, v: (r, 0))
    return pl.pallas_call(
        functools.partial(_hidden_gradient_kernel, options=options),
        grid=(rows // options.row_tile, options.num_vocabulary_tiles),
        in_specs=[
            *[row] * len(per_row),
            hidden_tile,
            pl.BlockSpec((options.vocabulary_tile, width), lambda r, v: (v, 0)),
        ],
        out_specs=hidden_tile,
        out_shape=jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        scratch_shapes=[pltpu.VMEM((options.row_tile, width), jnp.float32)],
        name="linear_logprob_hidden_gradient",
        **options.compiler_options("parallel", "arbitrary"),
    )(*per_row, hidden, head)


def _hidden_gradient_kernel(*refs, options):
    *per_row, hidden, head, gradient, total = refs
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def add(ragged):
        token = tiles.tokens_of(tile, options)
        # Rows past the vocabulary are anything, not-a-number included.
        head_rows = head[...]
        if ragged:
            head_token = tiles.tokens_of(tile, options, head_rows.shape[1])
            head_rows = jnp.where(head_token < options.vocabulary, head_rows, 0.0)
        slope = _logit_gradient(hidden[...], head_rows, token, per_row, options)
        if ragged:
            slope = jnp.where(token < options.vocabulary, slope, 0.0)
        total[...] += dot(slope.astype(head_rows.dtype), head_rows, 0, 0)

    tiles.for_last_and_others(tile, add, options)

    @pl.when(tile == options.num_vocabulary_tiles - 1)
    def _():
        gradient[...] = total[...].astype(gradient.dtype)


def _head_gradient_call(hidden, head, per_row, options):
    rows, width = hidden.shape
    row = pl.BlockSpec((1, options.row_tile), lambda v, r: (0, r))
    head_tile = pl.BlockSpec((options.vocabulary_tile, width), lambda v, r: (v, 0))
    return pl.pallas_call(
        functools.partial(_head_gradient_kernel, options=options),
        grid=(options.num_vocabulary_tiles, rows // options.row_tile),
        in_specs=[
            *[row] * len(per_row),
            pl.BlockSpec((options.row_tile, width), lambda v, r: (r, 0)),
            head_tile,
        ],
        out_specs=head_tile,
        out_shape=jax.ShapeDtypeStruct(head.shape, head.dtype),
        scratch_shapes=[pltpu.VMEM((options.vocabulary_tile, width), jnp.float32)],
        name="linear_logprob_head_gradient",
        **options.compiler_options("parallel", "arbitrary"),
    )(*per_row, hidden, head)


def _head_gradient_kernel(*refs, options):
    *per_row, hidden, head, gradient, total = refs
    row_index = pl.program_id(1)

    @pl.when(row_index == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    # Padded rows have a gradient of zero; rows past the vocabulary are dropped.
    token = tiles.tokens_of(pl.program_id(0), options)
    slope = _logit_gradient(hidden[...], head[...], token, per_row, options)
    total[...] += dot(slope.astype(hidden.dtype), hidden[...], 1, 0)

    @pl.when(row_index == pl.num_programs(1) - 1)
    def _():
        gradient[...] = total[...].astype(gradient.dtype)


def _logit_gradient(hidden, head, token, per_row, options):
    """Gradient with respect to uncapped, unscaled logits, `[vocabulary, rows]`.

    d log_prob / dz = onehot - p;  d entropy / dz = -p (log p + entropy).
    """
    labels, normaliser, entropy, to_log_prob, to_entropy = (ref[...] for ref in per_row)
    logits = tiles.logits_tile(hidden, head, options)
    log_probability = logits - normaliser
    probability = jnp.exp(log_probability)
    gradient = jnp.where(token == labels, to_log_prob, 0.0) - probability * (
        to_log_prob + to_entropy * (log_probability + entropy)
    )
    if options.soft_cap is not None:
        # z temperature / cap is the tanh itself.
        capped = logits * (options.temperature / options.soft_cap)
        gradient = gradient * (1.0 - capped * capped)
    return gradient * (1.0 / options.temperature)


def _sum(tile):
    return jnp.sum(tile, axis=0, keepdims=True)
