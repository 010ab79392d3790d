"""Rewards for features that match the true text's, the method's own."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ebft.functional.inner_products import WHITENINGS
from keras_ebft.functional.pooling import unit_length
from keras_ebft.kernels import feature_reward
from keras_ebft.records import Rollouts
from keras_ebft.rewards.reward import Reward
from keras_ebft.typing import Tensor
from keras_ebft.validation import (
    MOST_WEIGHT,
    check_choice,
    check_number,
    check_some_weight,
)

NORMALIZATIONS = ("auto", "token", "pooled")


@keras.saving.register_keras_serializable("keras_ebft")
class FeatureMatchingReward(Reward):
    """Rewards rollouts whose features match the true continuation's.

    See `keras_ebft.functional.feature_matching_rewards` for the equations
    (arXiv:2603.12248). With `"token"` pooling every generated token is rewarded
    by itself.

    Args:
        alignment_weight: float, from 0 to 1e6.
        diversity_weight: float, from 0 to 1e6.
        whitening: `"rollout"` (as the authors' code), `"feature"` (as the
            paper's appendix) or `None`. Eigenvalues below 1e-6 of the largest
            count as zero.
        normalize: what has length 1. `"token"`: each token's vector, as the feature
            network gives it (the authors' code). `"pooled"`: moreover what becomes
            of it, one window's features together. Without the latter, `"concat"`
            and `"mean"` pooling and `mode="stack"` weigh the diversity, an inner
            product, differently from the alignment, a cosine. `"auto"`: `"token"`
            with whitening, `"pooled"` without.

    Attributes:
        measures_unbiased: bool, whether `unbiased_feature_matching_loss` is measured
            too, which takes at least 2 rollouts per block.
            `keras_ebft.evaluation.FeatureMatching` turns it on for itself.

    Raises:
        TypeError: if a weight is not a number.
        ValueError: if a weight is negative, both are zero, or `whitening` is
            unknown.

    Example:
    >>> FeatureMatchingReward(diversity_weight=0.5).get_config()["whitening"]
    'rollout'
    """

    measures_unbiased = False

    def __init__(
        self,
        alignment_weight: float = 1.0,
        diversity_weight: float = 1.0,
        whitening: str | None = "rollout",
        normalize: str = "auto",
    ) -> None:
        self.alignment_weight = check_number(
            "alignment_weight", alignment_weight, 0.0, MOST_WEIGHT
        )
        self.diversity_weight = check_number(
            "diversity_weight", diversity_weight, 0.0, MOST_WEIGHT
        )
        check_some_weight(
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
        )
        self.whitening = check_choice("whitening", whitening, WHITENINGS)
        self.normalize = check_choice("normalize", normalize, NORMALIZATIONS)

    @property
    def normalizes_pooled(self) -> bool:
        """Whether one window's features together get length 1."""
        if self.normalize == "auto":
            return self.whitening is None
        return self.normalize == "pooled"

    @property
    def block_measures(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of what `__call__` measures once per block."""
        name = "feature_matching_loss"
        whitened = () if self.whitening is None else (f"whitened_{name}",)
        unbiased = (f"unbiased_{name}",) if self.measures_unbiased else ()
        return (name, *whitened, *unbiased)

    def __call__(
        self, generated: Tensor, target: Tensor, rollouts: Rollouts | None = None
    ) -> dict[str, Tensor]:
        """Rewards and distances of every block.

        Args:
            generated: float tensor `[B, n, K, F, D]` or `[B, n, K, G, F, D]`.
            target: float tensor `[B, K, F, D]` or `[B, K, G, F, D]`.
            rollouts: not used.

        None of it has a gradient.

        Returns:
            dict of float32 tensors: `alignment`, `diversity`, `reward`
            `[B, n, K]`; `feature_matching_loss` `[B, K]`, without whitening; and
            where whitening is on `whitened_feature_matching_loss` `[B, K]`; with
            `measures_unbiased` `unbiased_feature_matching_loss` `[B, K]`. With
            one feature per token `[B, n, K, G]` and `[B, K, G]`.
        """
        rewards = self._match(generated, target, "reinforce")
        del rewards["advantage"]
        return rewards

    def judge(
        self,
        generated: Tensor,
        target: Tensor,
        rollouts: Rollouts | None,
        estimator: str,
    ) -> dict[str, Tensor]:
        """`__call__` and `advantages` in one operation."""
        own = type(self)
        if (
            own.__call__ is not FeatureMatchingReward.__call__
            or own.advantages is not FeatureMatchingReward.advantages
        ):
            # A subclass that defines either is judged by what it defines.
            return super().judge(generated, target, rollouts, estimator)
        return self._match(generated, target, estimator)

    def _match(
        self, generated: Tensor, target: Tensor, estimator: str
    ) -> dict[str, Tensor]:
        if len(generated.shape) == 6:
            return _per_token(self._match, generated, target, estimator)
        if self.normalizes_pooled:
            generated, target = unit_length(generated), unit_length(target)
        return feature_reward(
            generated,
            target,
            whitening=self.whitening,
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
            estimator=estimator,
            unbiased=self.measures_unbiased,
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "alignment_weight": self.alignment_weight,
            "diversity_weight": self.diversity_weight,
            "whitening": self.whitening,
            "normalize": self.normalize,
        }


def _per_token(
    match: Callable[..., dict[str, Tensor]],
    generated: Tensor,
    target: Tensor,
    estimator: str,
) -> dict[str, Tensor]:
    """Rewards with every token as a block of its own."""
    batch, samples, blocks, steps, *feature = generated.shape
    flat = match(
        ops.reshape(generated, (batch, samples, blocks * steps, *feature)),
        ops.reshape(target, (batch, blocks * steps, *feature)),
        estimator,
    )
    return {
        name: ops.reshape(value, (*value.shape[:-1], blocks, steps))
        for name, value in flat.items()
    }
