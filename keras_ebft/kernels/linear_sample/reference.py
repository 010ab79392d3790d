"""The definition of `linear_sample`, with `[R, V]` probabilities in memory."""

from keras import ops

from keras_ebft.kernels.linear_logprob.reference import scaled_logits

# Tokens per group of the two-level search: running sums over V/128 groups and
# then 128 tokens are cheaper, and lose fewer digits, than one over V tokens.
GROUP = 128
# Elements that `running_sum` adds up at a time.
FEW = 16


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
    if groups * GROUP > size:
        weights = ops.pad(weights, ((0, 0), (0, groups * GROUP - size)))
    weights = ops.reshape(weights, (rows, groups, GROUP))
    group, rest = find_group(ops.sum(weights, axis=-1), uniform)
    chosen = ops.take_along_axis(weights, group[:, None, None], axis=1)[:, 0, :]
    return group * GROUP + find_in_group(chosen, rest)


def find_group(totals, uniform):
    """The group that each uniform number falls into.

    Args:
        totals: float32 tensor `[R, groups]`, sums of the weights of each group.
        uniform: float32 tensor `[R]` in [0, 1).

    Returns:
        `(group, rest)`: int32 `[R]`, and float32 `[R]`, the weight to go within it.
    """
    group_end = running_sum(totals)
    # Scaled by the same rounded sums it is compared with, so it stays below.
    goal = ops.minimum(uniform, _BELOW_ONE) * group_end[:, -1]
    group = _first_above(totals, group_end, goal)
    before = take(group_end, ops.maximum(group - 1, 0))
    return group, goal - ops.where(group > 0, before, ops.zeros_like(goal))


def find_in_group(weights, rest):
    """Index, int32 `[R]`, into a group's `weights` `[R, GROUP]`; see `find_group`."""
    token_end = running_sum(weights)
    rest = ops.minimum(rest, _BELOW_ONE * token_end[:, -1])
    return _first_above(weights, token_end, rest)


def running_sum(rows):
    """Sum of each element of a row and of all before it, `[R, N]` to `[R, N]`.

    For a TPU, XLA compiles `cumsum` along 17 to 128 elements for 2 ms a row, 15 s for
    rollouts of 16 documents; along more or fewer for half a second in all.
    """
    count = rows.shape[-1]
    if not FEW < count <= 128:
        return ops.cumsum(rows, axis=-1)
    size = count + -count % FEW
    if size > count:
        rows = ops.pad(rows, ((0, 0), (0, size - count)))
    few = ops.cumsum(ops.reshape(rows, (-1, size // FEW, FEW)), axis=-1)
    ends = ops.cumsum(few[..., -1], axis=-1)
    before = ops.pad(ends[:, :-1], ((0, 0), (1, 0)))
    return ops.reshape(few + before[..., None], (-1, size))[:, :count]


def take(rows, index):
    """Element `index[r]` of each row `r`."""
    return ops.take_along_axis(rows, index[:, None], axis=-1)[:, 0]


def linear_sample_reference(
    hidden, head, uniform, *, temperature=1.0, top_k=None, top_p=1.0, soft_cap=None
):
    """See `keras_ebft.kernels.linear_sample`."""
    # Greedy tokens are reported under the untempered distribution.
    logits = scaled_logits(
        hidden, head, temperature=temperature or 1.0, soft_cap=soft_cap
    )
    return sample_logits(logits, uniform, temperature, top_k, top_p)


def sample_logits(logits, uniform, temperature=1.0, top_k=None, top_p=1.0):
    """Tokens and their log-probabilities, out of scaled logits `[R, V]`."""
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits)
    return choose(logits, weights, uniform, temperature, top_k, top_p)


def choose(logits, weights, uniform, temperature=1.0, top_k=None, top_p=1.0):
    """Tokens and log-probabilities, out of logits less their largest `[R, V]`.

    `weights` are the exponentials of the logits.
    """
    normaliser = ops.log(ops.sum(weights, axis=-1))
    if temperature == 0.0:
        token_ids = ops.cast(ops.argmax(logits, axis=-1), "int32")
    else:
        kept = _truncate(weights, top_k, top_p)
        token_ids = invert_cumulative(kept, uniform)
    return token_ids, take(logits, token_ids) - normaliser


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


def _first_above(weights, running_sum, goal):
    """Index of the first sum above the goal, among weights that are not 0.

    Sums taken in parallel can differ by rounding where a weight of 0 was added, and
    the goal may lie in between.
    """
    size = weights.shape[-1]
    index = ops.arange(size, dtype="int32")
    counts = weights > 0
    above = ops.logical_and(counts, running_sum > goal[:, None])
    first = ops.min(ops.where(above, index, size), axis=-1)
    last = ops.max(ops.where(counts, index, 0), axis=-1)
    return ops.minimum(first, last)
