"""`feature_reward` for GPU in Pallas, lowered through Triton: one program per block.

Gram matrix and eigenvectors stay in registers. Products of n x n matrices are sums
over a third axis: they are too small for tensor cores, and float32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_ebft.kernels.feature_reward import jax_pallas_judge as judges
from keras_ebft.kernels.feature_reward.jacobi import padded_size, sweeps_for

# Columns of features read at a time, and warps, by the padded number of samples: sums
# are held as `[size, size, columns]` in registers.
TILES = {2: (128, 2), 4: (128, 2), 8: (64, 4), 16: (16, 4)}


def feature_reward_pallas_gpu(
    generated,
    target,
    *,
    whitening="rollout",
    alignment_weight=1.0,
    diversity_weight=1.0,
    estimator="rloo",
    unbiased=False,
    interpret=None,
):
    """See `keras_ebft.kernels.feature_reward`; at most 16 samples.

    `interpret` goes to `pallas_call`; `None` interprets where there is no GPU.
    """
    batch, samples, blocks = generated.shape[:3]
    options = judges.Options(
        samples,
        whitening,
        float(alignment_weight),
        float(diversity_weight),
        estimator,
        jax.default_backend() != "gpu" if interpret is None else interpret,
    )
    of_sample = jax.ShapeDtypeStruct((batch, samples, blocks), jnp.float32)
    of_block = jax.ShapeDtypeStruct((batch, blocks), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid=(blocks, batch),
        out_shape=[of_sample] * 4 + [of_block] * 3,
        name="feature_reward",
        compiler_params=plgpu.CompilerParams(
            num_warps=TILES[padded_size(samples)][1], num_stages=3
        ),
        interpret=options.interpret,
    )(generated, target)
    return judges.results(found[:4], found[4:], whitening, unbiased)


def _kernel(generated, target, *outputs, options):
    """Everything of one block. Rows past the samples are zero."""
    block, document = pl.program_id(0), pl.program_id(1)
    size = padded_size(options.samples)
    exists = jnp.arange(size) < options.samples
    ones = jnp.where(exists, 1.0, 0.0)

    def add(feature, totals):
        place = (document, block, feature)
        products = _inner_products(generated, target, place, exists)
        eigen = None
        if options.whitening is not None:
            eigen = _diagonalise(products[0])
        return judges.add_feature(totals, products, eigen, ones, options)

    totals = judges.no_totals(size, ())
    totals = lax.fori_loop(0, generated.shape[3], add, totals)
    for output, value in zip(outputs[:4], judges.judge(totals, ones, options)):
        place = output.at[document, pl.ds(0, size), block]
        plgpu.store(place, value, mask=exists)
    for output, value in zip(outputs[4:], totals[4:]):
        output[document, block] = value


def _inner_products(generated, target, place, exists):
    """`(M, g, q)` of one block and feature: the only pass over D.

    Each column of a tile has a sum of its own, joined at the end: fewer roundings in
    a row than one long sum.
    """
    size, width = exists.shape[0], target.shape[3]
    document, *feature = place
    columns = TILES[size][0]

    def add(step, sums):
        gram, cross, square = sums
        depth = pl.ds(step * columns, columns)
        inside = depth.start + jnp.arange(columns) < width
        mask = exists[:, None] & inside[None, :]
        rows = generated.at[(document, pl.ds(0, size), *feature, depth)]
        truth = target.at[(*place, depth)]
        x = plgpu.load(rows, mask=mask, other=0.0).astype(jnp.float32)
        t = plgpu.load(truth, mask=inside, other=0.0).astype(jnp.float32)
        gram += x[:, None, :] * x[None, :, :]
        return gram, cross + x * t[None, :], square + t * t

    sums = tuple(
        jnp.zeros((*shape, columns), jnp.float32)
        for shape in ((size, size), (size,), ())
    )
    sums = lax.fori_loop(0, pl.cdiv(width, columns), add, sums)
    return tuple(jnp.sum(part, axis=-1) for part in sums)


def _diagonalise(matrix):
    """Eigenvalues and eigenvectors, rows, of a symmetric matrix.

    Jacobi's method, n / 2 rotations at once: in round r of a sweep index i meets
    `i ^ r`, so that n - 1 rounds visit every pair (n is a power of two).
    """
    size = matrix.shape[0]
    index = jnp.arange(size)
    own = index[:, None] == index[None, :]

    def turn(round_, state):
        matrix, vectors = state
        partner = index ^ round_
        paired = partner[:, None] == index[None, :]
        diagonal = jnp.where(own, matrix, 0.0)
        here = jnp.sum(diagonal, axis=1)
        across = jnp.sum(diagonal, axis=0)
        there = jnp.sum(jnp.where(paired, across[None, :], 0.0), axis=1)
        # The same number for both of a pair, whatever rounding did to them.
        coupling = jnp.where(paired, matrix, 0.0)
        coupling = 0.5 * (jnp.sum(coupling, axis=1) + jnp.sum(coupling, axis=0))
        less, sine = judges.rotation(here, there, coupling)
        # Equal diagonals turn by 45 degrees, the two of a pair opposite ways.
        sine = jnp.where((here == there) & (index > partner), -sine, sine)
        less = jnp.where(own, less[:, None], 0.0)
        # The new rows are `c here - s there`, for both of a pair.
        rows = less - jnp.where(paired, sine[:, None], 0.0)
        columns = less - jnp.where(paired, sine[None, :], 0.0)
        matrix += _product(rows, matrix)
        matrix += _product(matrix, columns)
        return matrix, vectors + _product(rows, vectors)

    def sweep(_, state):
        return lax.fori_loop(1, size, turn, state)

    state = (matrix, jnp.where(own, 1.0, 0.0))
    matrix, vectors = lax.fori_loop(0, sweeps_for(size), sweep, state)
    return jnp.sum(jnp.where(own, matrix, 0.0), axis=0), vectors


def _product(one, two):
    """`one two` of square matrices."""
    return jnp.sum(one[:, :, None] * two[None, :, :], axis=1)
