"""Reward objects: features in, rewards of every rollout out."""

import keras

from keras_ebft import functional
from keras_ebft.configurable import Configurable
from keras_ebft.inner_products import WHITENINGS, feature_inner_products, whiten
from keras_ebft.validation import check_choice, check_number, check_some_weight


@keras.saving.register_keras_serializable("keras_ebft")
class FeatureMatchingReward(Configurable):
    """Rewards rollouts whose features match the true continuation's.

    See `keras_ebft.functional.feature_matching_rewards` for the equations
    (arXiv:2603.12248).

    Args:
        alignment_weight: float, not negative.
        diversity_weight: float, not negative.
        whitening: `"rollout"` (as the authors' code), `"feature"` (as the
            paper's appendix) or `None`. Eigenvalues below 1e-6 of the largest
            count as zero.

    Raises:
        TypeError: if a weight is not a number.
        ValueError: if a weight is negative, both are zero, or `whitening` is
            unknown.

    Example:
    >>> FeatureMatchingReward(diversity_weight=0.5).get_config()["whitening"]
    'rollout'
    """

    def __init__(self, alignment_weight=1.0, diversity_weight=1.0, whitening="rollout"):
        self.alignment_weight = check_number("alignment_weight", alignment_weight, 0.0)
        self.diversity_weight = check_number("diversity_weight", diversity_weight, 0.0)
        check_some_weight(
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
        )
        self.whitening = check_choice("whitening", whitening, WHITENINGS)

    @property
    def block_measures(self):
        """Names of what `__call__` measures once per block."""
        plain = ("feature_matching_loss",)
        return plain if self.whitening is None else (*plain, f"whitened_{plain[0]}")

    def __call__(self, generated, target):
        """Rewards and distances of every block.

        Args:
            generated: float tensor `[B, n, K, F, D]`.
            target: float tensor `[B, K, F, D]`.

        Returns:
            dict of float32 tensors: `alignment`, `diversity`, `reward`
            `[B, n, K]`; `feature_matching_loss` `[B, K]`, without whitening; and
            where whitening is on `whitened_feature_matching_loss` `[B, K]`.
        """
        raw = feature_inner_products(generated, target)
        plain = whiten(raw, None)
        products = whiten(raw, self.whitening)
        rewards = functional.rewards_from_inner_products(
            products, self.alignment_weight, self.diversity_weight
        )._asdict()
        rewards["feature_matching_loss"] = functional.feature_matching_loss(plain)
        if self.whitening is not None:
            rewards["whitened_feature_matching_loss"] = (
                functional.feature_matching_loss(products)
            )
        return rewards

    def advantages(self, rewards, estimator):
        """Advantages `[B, n, K]` of what `__call__` returned.

        Args:
            rewards: dict with `alignment` and `diversity`.
            estimator: name of the baseline, see
                `keras_ebft.functional.advantages`.
        """
        return functional.advantages(
            rewards["alignment"],
            rewards["diversity"],
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
            estimator=estimator,
        )

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "alignment_weight": self.alignment_weight,
            "diversity_weight": self.diversity_weight,
            "whitening": self.whitening,
        }
