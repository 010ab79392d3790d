"""What the TPU kernels over the output head share: tiles, and the logits of one.

Logits are held transposed, `[vocabulary tile, row tile]`: sums over the
vocabulary are then plain additions of registers, and what is kept per row lies
along the lanes, `[1, R]`, without padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels.jax_pallas_head import dot, scaled

LANES = 128
MAX_TILE = 512
# Bytes of one tile of hidden states or head. Backward passes hold about nine;
# wider rows than `LANES` of which fit have larger tiles, and ask for more memory.
TILE_BYTES = 2**22
TILES_IN_MEMORY = 12


class Options(NamedTuple):
    """What a call's kernels are compiled with."""

    temperature: float
    soft_cap: float | None
    vocabulary: int
    row_tile: int
    vocabulary_tile: int
    memory: int
    interpret: object

    @property
    def num_vocabulary_tiles(self):
        """Tiles of the head, the last of them perhaps ragged."""
        return pl.cdiv(self.vocabulary, self.vocabulary_tile)

    def compiler_options(self, *dimension_semantics):
        """Keyword arguments of `pallas_call`."""
        return {
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=dimension_semantics,
                vmem_limit_bytes=self.memory,
            ),
            "interpret": self.interpret,
        }


def make_options(hidden, head, temperature, soft_cap, interpret):
    """`Options` for operands `[R, D]` and `[V, D]` of one dtype.

    `interpret` of `None` interprets where there is no TPU.
    """
    if interpret is None:
        interpret = jax.default_backend() != "tpu"
    rows, width = hidden.shape
    width_bytes = width * hidden.dtype.itemsize
    # As many rows as fit, a power of two.
    fitting = max(TILE_BYTES // width_bytes, 1)
    tile = max(LANES, min(MAX_TILE, 2 ** (fitting.bit_length() - 1)))
    return Options(
        float(temperature),
        None if soft_cap is None else float(soft_cap),
        head.shape[0],
        min(tile, round_up(rows, LANES)),
        min(tile, round_up(head.shape[0], LANES)),
        TILES_IN_MEMORY * max(TILE_BYTES, LANES * width_bytes),
        interpret,
    )


def logits_tile(hidden, head, options):
    """Capped logits over the temperature, transposed: float32 `[V, R]` tiles."""
    return scaled(dot(head, hidden, 1, 1), options)


def tokens_of(tile, options, columns=None):
    """Token id of each element of a tile `[vocabulary tile, columns]`."""
    shape = (options.vocabulary_tile, columns or options.row_tile)
    first = tile * options.vocabulary_tile
    return first + lax.broadcasted_iota(jnp.int32, shape, 0)


def for_last_and_others(tile, visit, options):
    """Calls `visit(ragged)`: only the last tile can reach past the vocabulary."""
    if options.vocabulary % options.vocabulary_tile == 0:
        visit(False)
        return
    last = options.num_vocabulary_tiles - 1
    pl.when(tile == last)(functools.partial(visit, True))
    if last > 0:
        pl.when(tile < last)(functools.partial(visit, False))


def round_up(number, multiple):
    """The next multiple."""
    return -(-number // multiple) * multiple
