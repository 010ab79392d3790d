"""`linear_sample` for TPU: Pallas kernels that keep logits on the chip.

`jax_pallas_draw` says what the two passes are for, `jax_pallas_head_tpu` how tiles
of logits are held.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels import jax_pallas_head_tpu as tiles
from keras_ebft.kernels.jax_pallas_head import HIDDEN_LOGIT, dot, scaled
from keras_ebft.kernels.linear_sample.jax_pallas_draw import draw, take_likeliest
from keras_ebft.kernels.linear_sample.reference import GROUP

# Groups of the head on their way to the chip at a time, in the second pass.
GROUPS_PER_STEP = 8


def linear_sample_pallas_tpu(
    hidden,
    head,
    uniform,
    *,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    soft_cap=None,
    interpret=None,
):
    """See `keras_ebft.kernels.linear_sample`; without `top_k` and `top_p`.

    Logits are float32 throughout. Products of float32 tensors are as precise as
    `jax_default_matmul_precision` asks, as they are everywhere in JAX.

    `interpret` goes to `pallas_call`; `None` interprets where there is no TPU.
    """
    rows, vocabulary = hidden.shape[0], head.shape[0]
    greedy = temperature == 0.0
    options = tiles.make_options(hidden, head, temperature or 1.0, soft_cap, interpret)
    options = options._replace(
        vocabulary_tile=tiles.round_up(options.vocabulary_tile, GROUP)
    )
    largest, total, *token = _reduce(hidden, head, greedy, options)
    if greedy:
        return take_likeliest(largest, total, token[0], vocabulary)

    def group_logits(group):
        return _group_logits(hidden, head, group, options)[:rows]

    return draw(largest, total, group_logits, uniform, vocabulary)


def _reduce(hidden, head, greedy, options):
    """`(largest, total)` of every group, and where greedy its token, `[R, groups]`."""
    rows, width = hidden.shape
    padding = tiles.round_up(rows, options.row_tile) - rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    groups = options.vocabulary_tile // GROUP
    dtypes = (jnp.float32, jnp.float32, *[jnp.int32] * greedy)
    shape = (options.num_vocabulary_tiles, groups, rows + padding)
    found = pl.pallas_call(
        functools.partial(_reduce_kernel, options=options),
        grid=(shape[2] // options.row_tile, options.num_vocabulary_tiles),
        in_specs=[
            pl.BlockSpec((options.row_tile, width), lambda r, v: (r, 0)),
            pl.BlockSpec((options.vocabulary_tile, width), lambda r, v: (v, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, groups, options.row_tile), lambda r, v: (v, 0, r))
            for _ in dtypes
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
        name="linear_sample_reduce",
        **options.compiler_options("parallel", "parallel"),
    )(hidden, head)
    return [part.reshape(-1, shape[2]).T[:rows] for part in found]


def _reduce_kernel(hidden, head, largest, total, *place, options):
    tile = pl.program_id(1)

    def reduce(ragged):
        token = tiles.tokens_of(tile, options)
        logits = tiles.logits_tile(hidden[...], head[...], options)
        if ragged:
            logits = jnp.where(token < options.vocabulary, logits, HIDDEN_LOGIT)
        for index in range(options.vocabulary_tile // GROUP):
            group, inside = pl.ds(index, 1), slice(index * GROUP, (index + 1) * GROUP)
            own, own_token = logits[inside], token[inside]
            highest = jnp.max(own, axis=0, keepdims=True)
            weights = jnp.exp(own - highest)
            # A group past the vocabulary counts its tokens, and weighs nothing beside
            # any other: its largest logit is `HIDDEN_LOGIT`.
            largest[group] = highest
            total[group] = jnp.sum(weights, axis=0, keepdims=True)
            if place:
                # The first of the likeliest.
                first = jnp.where(own == highest, own_token, options.vocabulary)
                place[0][group] = jnp.min(first, axis=0, keepdims=True)

    tiles.for_last_and_others(tile, reduce, options)


def _group_logits(hidden, head, group, options):
    """Logits of one group per row, float32 `[R, GROUP]`, rows rounded up.

    Each program computes a few rows. It has the head once for each of them, at the
    place where the row's group is.
    """
    rows, width = hidden.shape
    fitting = 2 * tiles.TILE_BYTES // (GROUP * width * hidden.dtype.itemsize)
    step = 2 ** (min(max(fitting, 1), GROUPS_PER_STEP).bit_length() - 1)
    steps = pl.cdiv(rows, step)
    padding = steps * step - rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(steps, step, width)
    group = jnp.pad(group, (0, padding))

    def group_of(row):
        return lambda index, group: (group[index * step + row], 0)

    logits = pl.pallas_call(
        functools.partial(_group_logits_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec((None, step, width), lambda index, _: (index, 0, 0)),
                *[pl.BlockSpec((GROUP, width), group_of(row)) for row in range(step)],
            ],
            out_specs=pl.BlockSpec((None, step, GROUP), lambda index, _: (index, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((steps, step, GROUP), jnp.float32),
        name="linear_sample_group_logits",
        **options.compiler_options("parallel"),
    )(group, hidden, *[head] * step)
    return logits.reshape(-1, GROUP)


def _group_logits_kernel(_, hidden, *refs, options):
    *heads, logits = refs
    row = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    found = jnp.zeros(logits.shape, jnp.float32)
    for index, head in enumerate(heads):
        # Other rows come along: a product of one row takes as long.
        product = dot(hidden[...], head[...], 1, 1)
        found = jnp.where(row == index, product, found)
    logits[...] = scaled(found, options)
