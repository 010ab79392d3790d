"""Rewards: what is good about a rollout, and how good."""

from keras_ebft.rewards.characteristic_function import CharacteristicFunctionReward
from keras_ebft.rewards.feature_matching import FeatureMatchingReward
from keras_ebft.rewards.reward import Reward
from keras_ebft.rewards.reward_sum import RewardSum
from keras_ebft.rewards.verifier import VerifierReward

__all__ = [
    "CharacteristicFunctionReward",
    "FeatureMatchingReward",
    "Reward",
    "RewardSum",
    "VerifierReward",
]
