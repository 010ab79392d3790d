"""The definition of `linear_sample`, with `[R, V]` probabilities in memory."""

from keras import ops

from keras_ebft.kernels.linear_logprob.reference import scaled_logits

# Tokens per group of the two-level search: running sums over V/128 groups and
# then 128 tokens are cheaper, and lose fewer digits, than one over V tokens.
GROUP = 128


def invert_cumulative(weights, uniform):
    """Index of the first running sum of `weights` above `uniform * total`.

    Args:
        weights: float32 tensor `[R, V]`, not negative, unnormalised.
        uniform: float32 tensor `[R]` in [0, 1).

    Returns:
        int32 tensor `[R]`; the weight at the index is never 0.
    """
    rows, size = weights.shape
    groups = -(-size // GROUP)
    weights = ops.pad(weights, ((0, 0), (0, groups * GROUP - size)))
    weights = ops.reshape(weights, (rows, groups, GROUP))
    group_end = ops.cumsum(ops.sum(weights, axis=-1), axis=-1)
    # Scaled by the same rounded sums it is compared with, so it stays below.
    goal = ops.minimum(uniform, _BELOW_ONE) * group_end[:, -1]
    group = _first_above(group_end, goal)
    before = ops.where(
        group > 0, _take(group_end, ops.maximum(group - 1, 0)), ops.zeros_like(goal)
    )
    chosen = ops.take_along_axis(weights, group[:, None, None], axis=1)[:, 0, :]
    token_end = ops.cumsum(chosen, axis=-1)
    rest = ops.minimum(goal - before, _BELOW_ONE * token_end[:, -1])
    return group * GROUP + _first_above(token_end, rest)


def linear_sample_reference(
    hidden, head, uniform, *, temperature=1.0, top_k=None, top_p=1.0, soft_cap=None
):
    """See `keras_ebft.kernels.linear_sample`."""
    # Greedy tokens are reported under the untempered distribution.
    logits = scaled_logits(
        hidden, head, temperature=temperature or 1.0, soft_cap=soft_cap
    )
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits)
    normaliser = ops.log(ops.sum(weights, axis=-1))
    if temperature == 0.0:
        token_ids = ops.cast(ops.argmax(logits, axis=-1), "int32")
    else:
        kept = _truncate(weights, top_k, top_p)
        token_ids = invert_cumulative(kept, uniform)
    return token_ids, _take(logits, token_ids) - normaliser


def _truncate(weights, top_k, top_p):
    """Zero for all but the `top_k` largest and the nucleus of mass `top_p`."""
    if top_k is None and top_p == 1.0:
        return weights
    size = weights.shape[-1]
    largest, _ = ops.top_k(weights, size if top_k is None else min(top_k, size))
    if top_p < 1.0:
        mass = ops.cumsum(largest, axis=-1)
        # A token stays if the ones before it have not reached the mass yet.
        before = mass - largest
        inside = before < top_p * mass[:, -1:]
        largest = ops.where(inside, largest, largest[:, :1])
    smallest = ops.min(largest, axis=-1, keepdims=True)
    return ops.where(weights >= smallest, weights, ops.zeros_like(weights))


_BELOW_ONE = 1.0 - 1e-6


def _first_above(running_sum, goal):
    below = ops.cast(running_sum <= goal[:, None], "int32")
    return ops.cast(ops.sum(below, axis=-1), "int32")


def _take(rows, index):
    return ops.take_along_axis(rows, index[:, None], axis=-1)[:, 0]
