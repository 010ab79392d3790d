"""Rewards, advantages and distances of rollouts, from one pass over their features."""

from keras import ops

from keras_ebft.functional import ESTIMATORS
from keras_ebft.functional.inner_products import WHITENINGS, check_feature_shapes
from keras_ebft.kernels import dispatch
from keras_ebft.kernels.feature_reward.implementations import IMPLEMENTATIONS
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice

dispatch.register("feature_reward", IMPLEMENTATIONS)

# What the kernels' eigen-decompositions are made for.
MOST_SAMPLES = 16


def feature_reward(
    generated: Tensor,
    target: Tensor,
    *,
    whitening: str | None = "rollout",
    alignment_weight: float = 1.0,
    diversity_weight: float = 1.0,
    estimator: str = "rloo",
    unbiased: bool = False,
) -> dict[str, Tensor]:
    """All that is made of the features of a block's n rollouts.

    The Gram matrix of the rollouts and their products with the truth, summed over
    D, are the one pass over features. All else follows from these n x n numbers:
    `functional.feature_matching_rewards`, `functional.advantages` and the
    feature-matching losses. Nothing has a gradient: rewards are constants of the
    policy gradient, and a critic learns from the features themselves.

    Args:
        generated: float tensor `[B, n, K, F, D]`, features of the rollouts.
        target: float tensor `[B, K, F, D]`, features of the true continuation.
        whitening: `"rollout"`, `"feature"` or `None`.
        alignment_weight: float.
        diversity_weight: float.
        estimator: `"rloo"`, `"group_norm"` or `"reinforce"`.
        unbiased: bool, whether the unbiased loss is wanted too; needs n > 1.

    Returns:
        dict of float32 tensors: `alignment`, `diversity`, `reward`, `advantage`
        `[B, n, K]`; `feature_matching_loss` `[B, K]`, without whitening; with
        whitening also `whitened_feature_matching_loss`, and with `unbiased`
        `unbiased_feature_matching_loss`, `[B, K]`.

    Raises:
        ValueError: for shapes that do not fit, and unknown names; for `unbiased`
            with one rollout.
    """
    check_choice("whitening", whitening, WHITENINGS)
    check_choice("estimator", estimator, ESTIMATORS)
    generated = ops.stop_gradient(ops.convert_to_tensor(generated))
    target = ops.stop_gradient(ops.convert_to_tensor(target))
    check_feature_shapes(tuple(generated.shape), tuple(target.shape))
    options = dispatch.in_use(
        # The definition refuses this, whatever else could run.
        unbiased_of_one=unbiased and generated.shape[1] == 1,
        many_samples=generated.shape[1] > MOST_SAMPLES,
    )
    settings = {
        "whitening": whitening,
        "alignment_weight": alignment_weight,
        "diversity_weight": diversity_weight,
        "estimator": estimator,
        "unbiased": unbiased,
    }
    run = dispatch.choose(
        "feature_reward", (generated, target), options=options, settings=settings
    )
    return run(generated, target, **settings)
