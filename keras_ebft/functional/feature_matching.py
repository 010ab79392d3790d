"""The quantities of EBFT, each defined once, in plain `keras.ops`.

Axes: B documents, n samples, K blocks, G generated tokens per block,
F features, D feature width. Source of the equations: Jelassi et al., 2026,
"Matching Features, Not Tokens", arXiv:2603.12248.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_ebft.functional.inner_products import (
    InnerProducts,
    feature_inner_products,
    whiten,
)
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice

ESTIMATORS = ("rloo", "group_norm", "reinforce")

# `group_norm` divides by the standard deviation plus this.
GROUP_NORM_EPSILON = 1e-6
# A deviation below this share of the rewards' parts is rounding (whitened features of
# the same rollout were seen to differ by 3e-7 of them): it is not blown up.
SAME_REWARDS = 1e-5
COSINE_EPSILON = 1e-8


class FeatureMatchingRewards(NamedTuple):
    """Rewards of the n rollouts of every block, each `[B, n, K]` float32."""

    alignment: Any
    diversity: Any
    reward: Any


def feature_matching_rewards(
    generated: Tensor,
    target: Tensor,
    *,
    whitening: str | None = "rollout",
    alignment_weight: float = 1.0,
    diversity_weight: float = 1.0,
) -> FeatureMatchingRewards:
    """Rewards a rollout for nearness to the true feature, and for being unlike
    its siblings.

        alignment_j = 2 cos(phi_j, phi_*)
        diversity_j = 2 / (n - 1) * sum_{i != j} phi_i . phi_j
        reward_j    = alignment_weight * alignment_j
                      - diversity_weight * diversity_j

    after whitening (arXiv:2603.12248). With unit features and no whitening this
    is the REINFORCE reward of `|E[phi] - phi_*|^2`. With n = 1 the diversity
    is 0. Everything is computed from the n x n Gram matrix of a block.

    Args:
        generated: float tensor `[B, n, K, F, D]`, features of the rollouts.
        target: float tensor `[B, K, F, D]`, features of the true continuation.
        whitening: `"rollout"` (the authors' code), `"feature"` (the paper's
            appendix) or `None`.
        alignment_weight: float.
        diversity_weight: float.

    Returns:
        `FeatureMatchingRewards(alignment, diversity, reward)`, each `[B, n, K]`.

    Raises:
        ValueError: for an unknown `whitening` or shapes that do not fit.

    Example:
    >>> import numpy as np
    >>> generated = np.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 1, 2)
    >>> target = np.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rewards = feature_matching_rewards(generated, target, whitening=None)
    >>> [round(float(r), 3) for r in np.ravel(rewards.reward)]
    [2.0, 0.0]
    """
    products = whiten(feature_inner_products(generated, target), whitening)
    return rewards_from_inner_products(products, alignment_weight, diversity_weight)


def rewards_from_inner_products(
    products: InnerProducts, alignment_weight: float, diversity_weight: float
) -> FeatureMatchingRewards:
    """`feature_matching_rewards` once the (whitened) inner products are known.

    Args:
        products: `InnerProducts`, summed over features.
        alignment_weight: float.
        diversity_weight: float.

    Returns:
        `FeatureMatchingRewards`, each `[B, n, K]`.
    """
    square_norm = _diagonal(products.gram)
    target_square_norm = _diagonal(products.target_gram)
    norms = ops.sqrt(ops.maximum(square_norm, 0.0)) * ops.sqrt(
        ops.maximum(target_square_norm, 0.0)
    )
    alignment = 2.0 * _diagonal(products.cross) / ops.maximum(norms, COSINE_EPSILON)
    siblings = max(products.gram.shape[-1] - 1, 1)
    diversity = 2.0 / siblings * (ops.sum(products.gram, axis=-1) - square_norm)
    alignment = ops.swapaxes(alignment, 1, 2)
    diversity = ops.swapaxes(diversity, 1, 2)
    reward = alignment_weight * alignment - diversity_weight * diversity
    return FeatureMatchingRewards(alignment, diversity, reward)


def feature_matching_loss(products: InnerProducts) -> Tensor:
    """Squared distance between the mean rollout feature and the true one.

        | mean_j phi_j - phi_* |^2

    the Monte-Carlo form of the conditional feature-matching loss of
    arXiv:2603.12248. On average it lies above the loss itself by `tr Cov(phi) / n`,
    the variance of the mean; see `unbiased_feature_matching_loss`.

    Args:
        products: `InnerProducts` of one kind of whitening.

    Returns:
        float32 tensor `[B, K]`.
    """
    cross = products.cross
    total = products.gram - cross - ops.swapaxes(cross, -1, -2) + products.target_gram
    return ops.mean(total, axis=(-2, -1))


def unbiased_feature_matching_loss(products: InnerProducts) -> Tensor:
    """Estimate of `|E[phi] - phi_*|^2` whose mean does not depend on n.

        mean_{i != j} phi_i . phi_j - 2 mean_j phi_j . phi_* + |phi_*|^2

    `feature_matching_loss` without the products of rollouts with themselves. Of one
    block it can be negative; means over many blocks are what to look at. With unit
    features it is `1 - mean alignment + mean diversity / 2`, unwhitened.

    Args:
        products: `InnerProducts` without whitening, which would depend on the
            rollouts itself.

    Returns:
        float32 tensor `[B, K]`.

    Raises:
        ValueError: for a single rollout per block.
    """
    samples = products.gram.shape[-1]
    if samples < 2:
        raise ValueError(
            "Expected at least 2 rollouts per block for an unbiased estimate. "
            f"Received: {samples}. Use `feature_matching_loss`, or more rollouts."
        )
    pairs = ops.sum(products.gram, axis=(-2, -1)) - ops.sum(
        _diagonal(products.gram), axis=-1
    )
    target = ops.mean(products.target_gram, axis=(-2, -1))
    cross = ops.mean(products.cross, axis=(-2, -1))
    return pairs / (samples * (samples - 1)) - 2.0 * cross + target


def advantages(
    alignment: Tensor,
    diversity: Tensor,
    *,
    alignment_weight: float = 1.0,
    diversity_weight: float = 1.0,
    estimator: str = "rloo",
) -> Tensor:
    """Reward minus a baseline, over the n rollouts of each block.

    - `"rloo"`: leave-one-out. The baseline of rollout j uses only what does not
      depend on it:
      `b_j = alignment_weight * mean_{i != j} alignment_i - diversity_weight *
      (sum_i diversity_i - 2 diversity_j) / (n - 2)`;
      the diversity part is 0 for n <= 2 and the whole of it 0 for n = 1.
    - `"group_norm"`: `(reward - mean) / (std + 1e-6)`, with the unbiased
      standard deviation; 0 where that is below 1e-5 of the greatest
      `alignment_weight |alignment| + diversity_weight |diversity|`, because rewards
      so near each other differ by rounding.
    - `"reinforce"`: no baseline.

    Args:
        alignment: float tensor `[B, n, K]`, or `[B, n, K, G]` for one reward per
            token.
        diversity: float tensor of the same shape.
        alignment_weight: float.
        diversity_weight: float.
        estimator: one of `"rloo"`, `"group_norm"`, `"reinforce"`.

    Returns:
        float32 tensor of the same shape.

    Raises:
        ValueError: for an unknown `estimator`.

    Example:
    >>> import numpy as np
    >>> alignment = np.array([1.0, 2.0, 6.0]).reshape(1, 3, 1)
    >>> advantage = advantages(alignment, 0.0 * alignment)
    >>> np.ravel(ops.convert_to_numpy(advantage)).tolist()
    [-3.0, -1.5, 4.5]
    """
    check_choice("estimator", estimator, ESTIMATORS)
    alignment = ops.cast(alignment, "float32")
    diversity = ops.cast(diversity, "float32")
    alignment = alignment_weight * alignment
    diversity = diversity_weight * diversity
    if estimator == "reinforce":
        return alignment - diversity
    if estimator == "group_norm":
        return _group_normalised(alignment, diversity)
    return alignment - diversity - _leave_one_out_baseline(alignment, diversity)


def _leave_one_out_baseline(alignment: Tensor, diversity: Tensor) -> Tensor:
    samples = alignment.shape[1]
    if samples == 1:
        return ops.zeros_like(alignment)
    total = ops.sum(alignment, axis=1, keepdims=True)
    baseline = (total - alignment) / (samples - 1)
    if samples == 2:
        return baseline
    # Each pair of rollouts is counted in the diversity of both: taking 2 d_j
    # away leaves exactly the pairs that do not contain j.
    total = ops.sum(diversity, axis=1, keepdims=True)
    return baseline - (total - 2.0 * diversity) / (samples - 2)


def _group_normalised(alignment: Tensor, diversity: Tensor) -> Tensor:
    reward = alignment - diversity
    samples = reward.shape[1]
    centred = reward - ops.mean(reward, axis=1, keepdims=True)
    variance = ops.sum(ops.square(centred), axis=1, keepdims=True)
    deviation = ops.sqrt(variance / max(samples - 1, 1))
    scale = ops.max(ops.abs(alignment) + ops.abs(diversity), axis=1, keepdims=True)
    differ = deviation > SAME_REWARDS * scale
    return ops.where(differ, centred / (deviation + GROUP_NORM_EPSILON), 0.0)


def _diagonal(matrices: Tensor) -> Tensor:
    return ops.diagonal(matrices, axis1=-2, axis2=-1)
