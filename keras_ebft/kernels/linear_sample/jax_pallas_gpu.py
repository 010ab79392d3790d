"""`linear_sample` for GPU: Pallas kernels, lowered through Triton.

`jax_pallas_draw` says what the two passes are for. Logits stay in registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_ebft.kernels import jax_pallas_head_gpu as tiles
from keras_ebft.kernels.jax_pallas_gpu_calls import gpu_call
from keras_ebft.kernels.jax_pallas_head import scaled
from keras_ebft.kernels.linear_sample.jax_pallas_draw import draw, take_likeliest
from keras_ebft.kernels.linear_sample.reference import GROUP

ROW_TILE = 128


class _Options(NamedTuple):
    temperature: float
    soft_cap: float | None
    interpret: bool


def linear_sample_pallas_gpu(
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
    `jax_default_matmul_precision` asks and, where it asks nothing, float32.

    `interpret` goes to `pallas_call`; `None` interprets where there is no GPU.
    """
    vocabulary = head.shape[0]
    greedy = temperature == 0.0
    options = _Options(
        float(temperature) or 1.0,
        None if soft_cap is None else float(soft_cap),
        tiles.interprets(interpret),
    )
    hidden, head = tiles.pad_width(hidden, head)
    largest, total, *token = _reduce(hidden, head, greedy, options)
    if greedy:
        return take_likeliest(largest, total, token[0], vocabulary)

    def group_logits(group):
        return _group_logits(hidden, head, group, options)

    return draw(largest, total, group_logits, uniform, vocabulary)


def _reduce(hidden, head, greedy, options):
    """`(largest, total)` of every group, and where greedy its token, `[R, groups]`."""
    rows = hidden.shape[0]
    padding = -rows % ROW_TILE
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    dtypes = (jnp.float32, jnp.float32, *[jnp.int32] * greedy)
    shape = (pl.cdiv(head.shape[0], GROUP), rows + padding)
    found = gpu_call(
        functools.partial(_reduce_kernel, options=options),
        # Programs of one group run side by side, and read its tokens once.
        grid=(shape[1] // ROW_TILE, shape[0]),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
        name="linear_sample_reduce",
        **tiles.compiler_options(options.interpret),
    )(hidden, head)
    return [part.T[:rows] for part in found]


def _reduce_kernel(hidden, head, largest, total, *place, options):
    rows = pl.ds(pl.program_id(0) * ROW_TILE, ROW_TILE)
    group = pl.program_id(1)
    columns = pl.ds(group * GROUP, GROUP)
    logits, token = tiles.logits_tile(hidden, head, rows, columns, options)
    highest = jnp.max(logits, axis=1)
    largest[group, rows] = highest
    # Every group has a token, so that those past the vocabulary weigh 0.
    total[group, rows] = jnp.sum(jnp.exp(logits - highest[:, None]), axis=1)
    if place:
        # The first of the likeliest.
        first = jnp.where(logits == highest[:, None], token[None, :], head.shape[0])
        place[0][group, rows] = jnp.min(first, axis=1)


def _group_logits(hidden, head, group, options):
    """Logits of one group per row, float32 `[R, GROUP]`."""
    rows = hidden.shape[0]
    return gpu_call(
        functools.partial(_group_logits_kernel, options=options),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, GROUP), jnp.float32),
        name="linear_sample_group_logits",
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=options.interpret,
    )(hidden, head, group)


def _group_logits_kernel(hidden, head, group, logits, *, options):
    row = pl.program_id(0)
    depth = tiles.depth_of(hidden.dtype)
    columns = pl.ds(group[row] * GROUP, GROUP)
    within = columns.start + jnp.arange(GROUP) < head.shape[0]
    inside = jnp.broadcast_to(within[:, None], (GROUP, depth))

    def add(step, total):
        part = pl.ds(step * depth, depth)
        head_tile = plgpu.load(head.at[columns, part], mask=inside, other=0.0)
        own = hidden[row, part].astype(jnp.float32)
        return total + jnp.sum(head_tile.astype(jnp.float32) * own[None, :], axis=1)

    found = jnp.zeros((GROUP,), jnp.float32)
    found = lax.fori_loop(0, hidden.shape[1] // depth, add, found)
    logits[row, :] = scaled(found, options)
