"""What the GPU kernels over the output head share: the logits of one tile."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_ebft.kernels.jax_pallas_head import HIDDEN_LOGIT, dot, scaled


def interprets(interpret):
    """Whether to interpret: where there is no GPU, unless it is said."""
    return jax.default_backend() != "gpu" if interpret is None else interpret


def compiler_options(interpret):
    """Keyword arguments of `pallas_call` for tiles of 128 x 128."""
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=8, num_stages=3),
        "interpret": interpret,
    }


def pad_width(hidden, head):
    """The same with a width of whole steps of `depth_of`.

    Every large model has such a width: its head stays as it is.
    """
    padding = ((0, 0), (0, -hidden.shape[1] % depth_of(hidden.dtype)))
    return jnp.pad(hidden, padding), jnp.pad(head, padding)


def logits_tile(hidden, head, rows, columns, options):
    """Capped logits over the temperature of one tile, and its token ids.

    Logits past the vocabulary are `HIDDEN_LOGIT`.

    Args:
        hidden: reference to `[R, D]`.
        head: reference to `[V, D]`.
        rows: `pl.Slice` of whole rows.
        columns: `pl.Slice` of tokens; the vocabulary may end within it.
        options: has `temperature` and `soft_cap`.
    """
    depth = depth_of(hidden.dtype)
    token = columns.start + jnp.arange(columns.size, dtype=jnp.int32)
    within = token < head.shape[0]
    inside = jnp.broadcast_to(within[:, None], (columns.size, depth))

    def add(step, total):
        part = pl.ds(step * depth, depth)
        head_tile = plgpu.load(head.at[columns, part], mask=inside, other=0.0)
        return total + dot(hidden[rows, part], head_tile, 1, 1)

    logits = jnp.zeros((rows.size, columns.size), jnp.float32)
    logits = lax.fori_loop(0, hidden.shape[1] // depth, add, logits)
    return jnp.where(within[None, :], scaled(logits, options), HIDDEN_LOGIT), token


def depth_of(dtype):
    """Columns of hidden states read at a time: 128 bytes a row."""
    return 128 // dtype.itemsize
