"""The quantities of EBFT, each defined once, in plain `keras.ops`."""

from keras_ebft.functional.feature_matching import (
    ESTIMATORS,
    FeatureMatchingRewards,
    advantages,
    feature_matching_loss,
    feature_matching_rewards,
    rewards_from_inner_products,
    unbiased_feature_matching_loss,
)
from keras_ebft.functional.losses import (
    kl_estimate,
    policy_loss,
    probability_ratio,
    token_weights,
)

__all__ = [
    "ESTIMATORS",
    "FeatureMatchingRewards",
    "advantages",
    "feature_matching_loss",
    "feature_matching_rewards",
    "kl_estimate",
    "policy_loss",
    "probability_ratio",
    "rewards_from_inner_products",
    "token_weights",
    "unbiased_feature_matching_loss",
]
