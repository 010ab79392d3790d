"""`feature_reward` for TPU: two Pallas kernels, one over features, one over blocks.

The first reads the features once. It multiplies them as they lie, blocks by width,
and sums every pair of a block's vectors, the truth among them, in float32 without
the matrix unit. The second has blocks alone in its registers, 1024 of them a tile:
each number of an n x n matrix is one register, and Jacobi's method rotates two rows
and two columns of them at a time.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_ebft.kernels.feature_reward import jax_pallas_judge as judges
from keras_ebft.kernels.feature_reward.jacobi import sweeps_for

LANES = 128
# A tile of blocks of the second kernel, one register.
BLOCKS = (8, LANES)
# Bytes of one tile of features.
TILE_BYTES = 2**21
MEMORY = 2**25


def feature_reward_pallas_tpu(
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

    `interpret` goes to `pallas_call`; `None` interprets where there is no TPU.
    """
    batch, samples, blocks = generated.shape[:3]
    options = judges.Options(
        samples,
        whitening,
        float(alignment_weight),
        float(diversity_weight),
        estimator,
        jax.default_backend() != "tpu" if interpret is None else interpret,
    )
    products = _inner_products(generated, target, options)
    found = _judge(_in_tiles(products), options)

    def untiled(array):
        flat = array.reshape(*array.shape[:-2], -1)[..., : batch * blocks]
        return flat.reshape(*flat.shape[:-1], batch, blocks)

    rewards = [untiled(array).swapaxes(0, 1) for array in found[:4]]
    losses = [untiled(array) for array in found[4:]]
    return judges.results(rewards, losses, whitening, unbiased)


def _pairs(samples):
    """Pairs of a block's vectors, the last of which is the truth."""
    return tuple(itertools.combinations_with_replacement(range(samples + 1), 2))


def _compiler_options(options, *dimension_semantics):
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=dimension_semantics, vmem_limit_bytes=MEMORY
        ),
        "interpret": options.interpret,
    }


def _inner_products(generated, target, options):
    """Products of all `_pairs` of vectors, float32 `[B, F, pairs, K]`."""
    batch, samples, blocks, features, width = generated.shape
    padding = -width % LANES
    width += padding

    def rows(tensor):
        """Features side by side, each a whole number of lanes wide."""
        tensor = jnp.pad(tensor, [(0, 0)] * (tensor.ndim - 1) + [(0, padding)])
        return tensor.reshape(*tensor.shape[:-2], features * width)

    fitting = TILE_BYTES // (samples * LANES * generated.dtype.itemsize)
    tile = LANES
    while 2 * tile <= fitting and width % (2 * tile) == 0:
        tile *= 2
    steps = width // tile
    num_pairs = len(_pairs(samples))
    return pl.pallas_call(
        functools.partial(_inner_products_kernel, samples=samples),
        grid=(batch, pl.cdiv(blocks, LANES), features, steps),
        in_specs=[
            pl.BlockSpec(
                (None, samples, LANES, tile),
                lambda b, k, f, d: (b, 0, k, f * steps + d),
            ),
            pl.BlockSpec((None, LANES, tile), lambda b, k, f, d: (b, k, f * steps + d)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, num_pairs, LANES), lambda b, k, f, d: (b, f, 0, k)
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, features, num_pairs, blocks), jnp.float32
        ),
        scratch_shapes=[pltpu.VMEM((num_pairs, LANES, LANES), jnp.float32)],
        name="feature_reward_inner_products",
        **_compiler_options(options, "parallel", "parallel", "parallel", "arbitrary"),
    )(rows(generated), rows(target))


def _inner_products_kernel(generated, target, products, sums, *, samples):
    """Sums per block and lane, joined at the end. Rows past K are anything."""
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    # A register holds 8 rows of float32 and 16 of bfloat16.
    count = min(32 // generated.dtype.itemsize, LANES)

    def add(group, carry):
        rows = pl.ds(pl.multiple_of(group * count, count), count)
        vectors = [generated[j, rows] for j in range(samples)] + [target[rows]]
        vectors = [vector.astype(jnp.float32) for vector in vectors]
        for place, (i, j) in enumerate(_pairs(samples)):
            product = vectors[i] * vectors[j]
            parts = jnp.split(product, product.shape[1] // LANES, axis=1)
            sums[place, rows] += sum(parts[1:], parts[0])
        return carry

    lax.fori_loop(0, LANES // count, add, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        def join(place, carry):
            joined = jnp.sum(sums[place].T, axis=0, keepdims=True)
            products[pl.ds(place, 1)] = joined
            return carry

        lax.fori_loop(0, products.shape[0], join, 0)


def _in_tiles(products):
    """`[B, F, pairs, K]` as `[F, pairs, tiles of blocks]`, zeros at the end."""
    batch, features, pairs, blocks = products.shape
    flat = products.transpose(1, 2, 0, 3).reshape(features, pairs, batch * blocks)
    padding = -flat.shape[-1] % (BLOCKS[0] * BLOCKS[1])
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, padding)))
    return flat.reshape(features, pairs, -1, BLOCKS[1])


def _judge(products, options):
    """Four rewards `[n, tiles of blocks]` and three losses `[tiles of blocks]`."""
    features, pairs, *tiles = products.shape
    samples = options.samples
    matrix = pltpu.VMEM((samples, samples, *BLOCKS), jnp.float32)
    per_sample = pltpu.VMEM((samples, *BLOCKS), jnp.float32)
    per_block = pltpu.VMEM(BLOCKS, jnp.float32)
    of_sample = pl.BlockSpec((samples, *BLOCKS), lambda t, f: (0, t, 0))
    of_block = pl.BlockSpec(BLOCKS, lambda t, f: (t, 0))
    shapes = [(samples, *tiles)] * 4 + [tuple(tiles)] * 3
    return pl.pallas_call(
        functools.partial(_judge_kernel, options=options),
        grid=(tiles[0] // BLOCKS[0], features),
        in_specs=[
            pl.BlockSpec((None, pairs, *BLOCKS), lambda t, f: (f, 0, t, 0)),
        ],
        out_specs=[of_sample] * 4 + [of_block] * 3,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch_shapes=[matrix] * 2 + [per_sample] * 4 + [per_block] * 3,
        name="feature_reward_judge",
        **_compiler_options(options, "parallel", "arbitrary"),
    )(products)


def _judge_kernel(products, *refs, options):
    outputs, (matrix, vectors), totals = refs[:7], refs[7:9], refs[9:]
    samples, feature = options.samples, pl.program_id(1)

    @pl.when(feature == 0)
    def _():
        for total in totals:
            total[...] = jnp.zeros_like(total)

    for place, (i, j) in enumerate(_pairs(samples)):
        if j < samples:
            matrix[i, j] = products[place]
            matrix[j, i] = products[place]
    with_truth = [
        products[place] for place, (_, j) in enumerate(_pairs(samples)) if j == samples
    ]
    gram = matrix[...]
    eigen = None
    if options.whitening is not None:
        eigen = _diagonalise(matrix, vectors)
    ones = jnp.ones((samples, *BLOCKS), jnp.float32)
    found = judges.add_feature(
        judges.Totals(*(total[...] for total in totals)),
        (gram, jnp.stack(with_truth[:-1]), with_truth[-1]),
        eigen,
        ones,
        options,
    )
    for total, value in zip(totals, found):
        total[...] = value

    @pl.when(feature == pl.num_programs(1) - 1)
    def _():
        final = judges.Totals(*(total[...] for total in totals))
        rewards = judges.judge(final, ones, options)
        for output, value in zip(outputs, (*rewards, *final[4:])):
            output[...] = value


def _diagonalise(matrix, vectors):
    """Eigenvalues and eigenvectors, rows, of `matrix`, which is overwritten.

    Cyclic Jacobi: a sweep turns every pair of indices once.
    """
    size = matrix.shape[0]
    for i, j in itertools.product(range(size), repeat=2):
        vectors[i, j] = jnp.full(BLOCKS, float(i == j), jnp.float32)

    def turn(p, q):
        less, sine = judges.rotation(matrix[p, p], matrix[q, q], matrix[p, q])

        def turned(one, two):
            return one + less * one - sine * two, two + less * two + sine * one

        matrix[p], matrix[q] = turned(matrix[p], matrix[q])
        matrix[:, p], matrix[:, q] = turned(matrix[:, p], matrix[:, q])
        vectors[p], vectors[q] = turned(vectors[p], vectors[q])

    def sweep(_, carry):
        def with_first(p, carry):
            def with_second(q, carry):
                turn(p, q)
                return carry

            return lax.fori_loop(p + 1, size, with_second, carry)

        return lax.fori_loop(0, size - 1, with_first, carry)

    lax.fori_loop(0, sweeps_for(size), sweep, 0)
    return judges.diagonal(matrix[...]), vectors[...]
