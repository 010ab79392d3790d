"""Kernel bodies of `feature_reward` in Triton.

Products of n x n matrices are float32 throughout, which eigenvalues near the cut-off
need.
"""

import triton
import triton.language as tl

# ruff: noqa: N803, PLR0915


@triton.jit
def small_product(a, b, SIZE: tl.constexpr):
    """`a b` of square matrices."""
    if SIZE < 16:
        found = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        # From this size on Triton makes the sum above a product of matrices, and up to
        # 3.6 one on tensor cores, which round to TensorFloat-32.
        found = tl.dot(a, b, input_precision="ieee")
    return found


@triton.jit
def diagonalise(matrix, SIZE: tl.constexpr, SWEEPS: tl.constexpr):
    """Eigenvalues `[SIZE]` and eigenvectors, columns, of a symmetric matrix.

    Jacobi's method, SIZE / 2 rotations at once: in round r of a sweep index i meets
    `i ^ r`, so that SIZE - 1 rounds visit every pair (SIZE is a power of two). A
    rotation is applied as its difference from the identity: the small ones of late
    sweeps then add hardly any rounding.
    """
    index = tl.arange(0, SIZE)
    own = index[:, None] == index[None, :]
    vectors = tl.where(own, 1.0, 0.0)
    for step in range(SWEEPS * (SIZE - 1)):
        partner = index ^ (step % (SIZE - 1) + 1)
        paired = partner[:, None] == index[None, :]
        diagonal = tl.where(own, matrix, 0.0)
        here = tl.sum(diagonal, axis=1)
        there = tl.sum(tl.where(paired, tl.sum(diagonal, axis=0)[None, :], 0.0), axis=1)
        coupling = tl.where(paired, matrix, 0.0)
        # The same number for both of a pair, whatever rounding did to them.
        coupling = 0.5 * (tl.sum(coupling, axis=1) + tl.sum(coupling, axis=0))
        # Pairs that need no rotation, both zero included; nothing below overflows.
        apart = tl.abs(coupling) <= 1e-12 * tl.abs(there - here)
        slope = (there - here) / tl.where(apart, 1.0, 2.0 * coupling)
        slope = tl.where(apart, 0.0, slope)
        tangent = 1.0 / (tl.abs(slope) + tl.sqrt(slope * slope + 1.0))
        # Equal diagonals turn by 45 degrees, the two of a pair opposite ways.
        upwards = (slope > 0.0) | ((slope == 0.0) & (index < partner))
        tangent = tl.where(apart, 0.0, tl.where(upwards, tangent, -tangent))
        cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
        sine = tangent * cosine
        turned = (-sine * sine / (1.0 + cosine))[:, None]
        mixed = tl.where(paired, sine[:, None], 0.0)
        rotation = tl.where(own, turned, mixed)
        transposed = tl.where(own, turned, -mixed)
        matrix += small_product(transposed, matrix, SIZE)
        matrix += small_product(matrix, rotation, SIZE)
        vectors += small_product(vectors, rotation, SIZE)
    return tl.sum(tl.where(own, matrix, 0.0), axis=0), vectors


@triton.jit
def apply_powers(vectors, powers, vector):
    """`V diag(powers) V^T vector`."""
    coefficients = tl.sum(vectors * vector[:, None], axis=0) * powers
    return tl.sum(vectors * coefficients[None, :], axis=1)


@triton.jit
def inner_products(
    generated, target, exists, row_stride, width,
    SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`(M, g, q)` of one block and feature: the only pass over D.

    Each of `LANES` lanes has a sum of its own, joined at the end: fewer roundings
    in a row than one long sum.
    """
    row = tl.arange(0, SIZE).to(tl.int64) * row_stride
    products = tl.zeros((SIZE, SIZE, LANES), dtype=tl.float32)
    crosses = tl.zeros((SIZE, LANES), dtype=tl.float32)
    squares = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, width, LANES):
        depth = start + tl.arange(0, LANES)
        inside = depth < width
        x = tl.load(
            generated + row[:, None] + depth[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        t = tl.load(target + depth, mask=inside, other=0.0).to(tl.float32)
        products += x[:, None, :] * x[None, :, :]
        crosses += x * t[None, :]
        squares += t * t
    return tl.sum(products, axis=2), tl.sum(crosses, axis=1), tl.sum(squares, axis=0)


@triton.jit
def reward_blocks(
    generated, target, alignment_out, diversity_out, reward_out, advantage_out,
    loss_out, whitened_loss_out, unbiased_loss_out, num_blocks, num_features, width,
    row_stride, alignment_weight, diversity_weight,
    SAMPLES: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    SWEEPS: tl.constexpr, WHITENING: tl.constexpr, ESTIMATOR: tl.constexpr,
    CUTOFF: tl.constexpr, COSINE_EPSILON: tl.constexpr,
    GROUP_NORM_EPSILON: tl.constexpr,
    SAME_REWARDS: tl.constexpr,
):  # fmt: skip
    """Everything of one block. Programs: `(documents * blocks,)`.

    `SIZE` is `SAMPLES` or the next power of two: rows beyond are zero. The inner
    products after whitening are a symmetric matrix N of rollouts, `u r^T` of
    rollouts and targets, and `q r r^T` of targets; only their diagonals and sums
    are needed.
    """
    program = tl.program_id(0).to(tl.int64)
    document = program // num_blocks
    block = program % num_blocks
    index = tl.arange(0, SIZE)
    exists = index < SAMPLES
    ones = tl.where(exists, 1.0, 0.0)
    own = index[:, None] == index[None, :]
    # Of a document's samples, and of its truth, block by block.
    x = generated + document * SAMPLES * row_stride + block * num_features * width
    t = target + program * num_features * width

    norm = tl.zeros((SIZE,), dtype=tl.float32)
    row_sum = tl.zeros((SIZE,), dtype=tl.float32)
    cross = tl.zeros((SIZE,), dtype=tl.float32)
    target_norm = tl.zeros((SIZE,), dtype=tl.float32)
    loss = 0.0
    whitened_loss = 0.0
    unbiased_loss = 0.0
    for feature in range(num_features):
        gram, u, q = inner_products(
            x + feature * width, t + feature * width, exists, row_stride, width,
            SIZE, LANES,
        )  # fmt: skip
        sums = tl.sum(gram, axis=1)
        squares = tl.sum(tl.where(own, gram, 0.0), axis=1)
        to_target = q - 2.0 * tl.sum(u, axis=0) / SAMPLES
        loss += tl.sum(sums, axis=0) / (SAMPLES * SAMPLES) + to_target
        if SAMPLES > 1:
            pairs = tl.sum(sums - squares, axis=0) / (SAMPLES * (SAMPLES - 1))
            unbiased_loss += pairs + to_target
        r = ones
        if WHITENING != "none":
            values, vectors = diagonalise(gram, SIZE, SWEEPS)
            kept = values > CUTOFF * tl.maximum(tl.max(values, axis=0), 0.0)
            safe = tl.where(kept, values, 1.0)
            on_range = tl.where(kept, 1.0, 0.0)
            sums = apply_powers(vectors, on_range, ones)
            squares = tl.sum(vectors * vectors * on_range[None, :], axis=1)
            if WHITENING == "rollout":
                powers = tl.where(kept, 1.0 / tl.sqrt(safe), 0.0)
                r = apply_powers(vectors, powers, ones)
                u = apply_powers(vectors, powers, u)
            else:
                u = apply_powers(vectors, tl.where(kept, 1.0 / safe, 0.0), u)
                q = SAMPLES * tl.sum(u * u, axis=0)
                u = SAMPLES * u
                sums = SAMPLES * sums
                squares = SAMPLES * squares
        norm += squares
        row_sum += sums
        cross += u * r
        target_norm += q * r * r
        total = tl.sum(r, axis=0)
        distance = tl.sum(sums, axis=0) - 2.0 * tl.sum(u, axis=0) * total
        whitened_loss += (distance + q * total * total) / (SAMPLES * SAMPLES)

    norms = tl.sqrt(tl.maximum(norm, 0.0)) * tl.sqrt(tl.maximum(target_norm, 0.0))
    alignment = 2.0 * cross / tl.maximum(norms, COSINE_EPSILON)
    alignment = tl.where(exists, alignment, 0.0)
    diversity = tl.zeros((SIZE,), dtype=tl.float32)
    if SAMPLES > 1:
        diversity = tl.where(exists, 2.0 / (SAMPLES - 1) * (row_sum - norm), 0.0)
    one = alignment_weight * alignment
    two = diversity_weight * diversity
    reward = one - two
    advantage = reward
    if ESTIMATOR == "rloo":
        if SAMPLES > 1:
            advantage -= (tl.sum(one, axis=0) - one) / (SAMPLES - 1)
        if SAMPLES > 2:
            advantage += (tl.sum(two, axis=0) - 2.0 * two) / (SAMPLES - 2)
    elif ESTIMATOR == "group_norm":
        centred = tl.where(exists, reward - tl.sum(reward, axis=0) / SAMPLES, 0.0)
        variance = tl.sum(centred * centred, axis=0) / max(SAMPLES - 1, 1)
        deviation = tl.sqrt(variance)
        scale = tl.max(tl.abs(one) + tl.abs(two), axis=0)
        differ = deviation > SAME_REWARDS * scale
        advantage = tl.where(differ, centred / (deviation + GROUP_NORM_EPSILON), 0.0)

    place = (document * SAMPLES + index) * num_blocks + block
    tl.store(alignment_out + place, alignment, mask=exists)
    tl.store(diversity_out + place, diversity, mask=exists)
    tl.store(reward_out + place, reward, mask=exists)
    tl.store(advantage_out + place, advantage, mask=exists)
    tl.store(loss_out + program, loss)
    tl.store(whitened_loss_out + program, whitened_loss)
    tl.store(unbiased_loss_out + program, unbiased_loss)
