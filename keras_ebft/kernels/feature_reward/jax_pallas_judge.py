"""What follows from the inner products of a block, for both Pallas kernels.

Samples lie along the first axis (of matrices the first two), blocks along those
behind it: on TPU a tile of them, on GPU none. After whitening, the inner products are
a symmetric matrix N of rollouts, `u r^T` of rollouts and targets, and `q r r^T` of
targets; only their diagonals and sums are needed.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from keras_ebft.functional.feature_matching import (
    COSINE_EPSILON,
    GROUP_NORM_EPSILON,
    SAME_REWARDS,
)
from keras_ebft.functional.inner_products import EIGENVALUE_CUTOFF


class Options(NamedTuple):
    """What a call's kernels are compiled with."""

    samples: int
    whitening: str | None
    alignment_weight: float
    diversity_weight: float
    estimator: str
    interpret: object


class Totals(NamedTuple):
    """Sums over features: of diagonals and rows, `[n, *S]`, and of losses, `[*S]`."""

    norm: Any
    row_sum: Any
    cross: Any
    target_norm: Any
    loss: Any
    whitened_loss: Any
    unbiased_loss: Any


def no_totals(samples, shape):
    """`Totals` of no features, for `shape` of blocks."""
    per_sample = [jnp.zeros((samples, *shape), jnp.float32)] * 4
    return Totals(*per_sample, *[jnp.zeros(shape, jnp.float32)] * 3)


def rotation(here, there, coupling):
    """`(c - 1, s)` of the rotation that takes the coupling of two indices away.

    The new rows are `c here - s there` and `s here + c there`. As its difference from
    the identity a small rotation adds hardly any rounding.
    """
    # Pairs that need no rotation, both zero included; nothing below overflows.
    apart = jnp.abs(coupling) <= 1e-12 * jnp.abs(there - here)
    slope = (there - here) / jnp.where(apart, 1.0, 2.0 * coupling)
    slope = jnp.where(apart, 0.0, slope)
    tangent = 1.0 / (jnp.abs(slope) + jnp.sqrt(slope * slope + 1.0))
    # The other way around for the other of a pair, unless the two are equal.
    downwards = jnp.logical_xor(there < here, coupling < 0.0)
    tangent = jnp.where(downwards, -tangent, tangent)
    tangent = jnp.where(apart, 0.0, tangent)
    cosine = 1.0 / jnp.sqrt(1.0 + tangent * tangent)
    sine = tangent * cosine
    return -sine * sine / (1.0 + cosine), sine


def add_feature(totals, products, eigen, ones, options):
    """`Totals` with one more feature.

    Args:
        totals: `Totals`.
        products: `(M, g, q)`: `[n, n, *S]` of rollouts, `[n, *S]` of rollouts and the
            truth, `[*S]` of the truth.
        eigen: `(values, vectors)` of M, `[n, *S]` and, one vector a row,
            `[n, n, *S]`; not read without whitening.
        ones: float32 `[n, *S]`, 0 for samples that are padding.
        options: `Options`.
    """
    gram, u, q = products
    samples = options.samples
    sums, squares = jnp.sum(gram, axis=1), diagonal(gram)
    to_target = q - 2.0 / samples * jnp.sum(u, axis=0)
    loss = jnp.sum(sums, axis=0) * (1.0 / samples**2) + to_target
    pairs = max(samples * (samples - 1), 1)
    unbiased = jnp.sum(sums - squares, axis=0) * (1.0 / pairs) + to_target
    r = ones
    if options.whitening is not None:
        values, vectors = eigen
        largest = jnp.maximum(jnp.max(values, axis=0), 0.0)
        kept = values > EIGENVALUE_CUTOFF * largest
        safe = jnp.where(kept, values, 1.0)
        on_range = jnp.where(kept, 1.0, 0.0)
        sums = _apply_powers(vectors, on_range, ones)
        squares = jnp.sum(vectors * vectors * on_range[:, None], axis=0)
        if options.whitening == "rollout":
            powers = jnp.where(kept, 1.0 / jnp.sqrt(safe), 0.0)
            r = _apply_powers(vectors, powers, ones)
            u = _apply_powers(vectors, powers, u)
        else:
            u = _apply_powers(vectors, jnp.where(kept, 1.0 / safe, 0.0), u)
            q = samples * jnp.sum(u * u, axis=0)
            u, sums, squares = samples * u, samples * sums, samples * squares
    total = jnp.sum(r, axis=0)
    distance = jnp.sum(sums, axis=0) - 2.0 * jnp.sum(u, axis=0) * total
    distance = (distance + q * total * total) * (1.0 / samples**2)
    found = (squares, sums, u * r, q * r * r, loss, distance, unbiased)
    return Totals(*(one + two for one, two in zip(totals, found)))


def diagonal(matrix):
    """`[n, *S]` of `[n, n, *S]`."""
    first, second = (
        lax.broadcasted_iota(jnp.int32, matrix.shape, axis) for axis in (0, 1)
    )
    return jnp.sum(jnp.where(first == second, matrix, 0.0), axis=1)


def _apply_powers(vectors, powers, vector):
    """`V diag(powers) V^T vector`, with the vectors as rows."""
    coefficients = jnp.sum(vectors * vector, axis=1) * powers
    return jnp.sum(vectors * coefficients[:, None], axis=0)


def judge(totals, ones, options):
    """`(alignment, diversity, reward, advantage)`, each `[n, *S]`."""
    samples, norm = options.samples, totals.norm
    norms = jnp.sqrt(jnp.maximum(norm, 0.0))
    norms *= jnp.sqrt(jnp.maximum(totals.target_norm, 0.0))
    alignment = ones * 2.0 * totals.cross / jnp.maximum(norms, COSINE_EPSILON)
    diversity = ones * (2.0 / max(samples - 1, 1)) * (totals.row_sum - norm)
    one = options.alignment_weight * alignment
    two = options.diversity_weight * diversity
    reward = one - two
    advantage = reward
    if options.estimator == "rloo" and samples > 1:
        advantage -= (jnp.sum(one, axis=0) - one) * (1.0 / (samples - 1))
        if samples > 2:
            others = jnp.sum(two, axis=0) - 2.0 * two
            advantage += others * (1.0 / (samples - 2))
    elif options.estimator == "group_norm":
        mean = jnp.sum(reward, axis=0) * (1.0 / samples)
        centred = ones * (reward - mean)
        variance = jnp.sum(centred * centred, axis=0) * (1.0 / max(samples - 1, 1))
        deviation = jnp.sqrt(variance)
        scale = jnp.max(jnp.abs(one) + jnp.abs(two), axis=0)
        differ = deviation > SAME_REWARDS * scale
        advantage = jnp.where(differ, centred / (deviation + GROUP_NORM_EPSILON), 0.0)
    return alignment, diversity, reward, advantage


def results(rewards, losses, whitening, unbiased):
    """The operation's dict of four rewards and three losses."""
    found = dict(zip(("alignment", "diversity", "reward", "advantage"), rewards))
    found["feature_matching_loss"] = losses[0]
    if whitening is not None:
        found["whitened_feature_matching_loss"] = losses[1]
    if unbiased:
        found["unbiased_feature_matching_loss"] = losses[2]
    return found
