"""Weighted sums of rewards."""

from collections.abc import Sequence
from typing import Any

import keras
import keras_hub

from keras_ebft.records import Rollouts
from keras_ebft.rewards.reward import Reward
from keras_ebft.typing import Tensor
from keras_ebft.validation import (
    MOST_WEIGHT,
    check_instance,
    check_number,
    check_some_weight,
)


@keras.saving.register_keras_serializable("keras_ebft")
class RewardSum(Reward):
    """A weighted sum of rewards.

    Args:
        rewards: list of `Reward` objects.
        weights: list of floats, one per reward; by default all 1.

    Raises:
        TypeError: if an entry is not a `Reward`, or a weight not a number.
        ValueError: for an empty list, another number of weights, weights that are
            negative or all zero.

    Example:
    >>> from keras_ebft.rewards import FeatureMatchingReward, VerifierReward
    >>> verifier = VerifierReward(len, decode=False)
    >>> RewardSum([FeatureMatchingReward(), verifier], [1.0, 0.5]).weights
    [1.0, 0.5]
    """

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float] | None = None
    ) -> None:
        if not isinstance(rewards, (list, tuple)) or not rewards:
            raise ValueError(
                "Expected `rewards` to be a non-empty list of rewards. Received: "
                f"rewards={rewards!r}."
            )
        remedy = "Pass keras_ebft.FeatureMatchingReward(), for example."
        self.rewards = [check_instance("rewards", r, Reward, remedy) for r in rewards]
        weights = [1.0] * len(rewards) if weights is None else weights
        if not isinstance(weights, (list, tuple)):
            raise TypeError(
                "Expected `weights` to be a list, one for each of the rewards. "
                f"Received: weights={weights!r} (of type {type(weights).__name__}). "
                f"Pass for example weights={[1.0] * len(rewards)}."
            )
        if len(weights) != len(rewards):
            raise ValueError(
                f"Expected one weight for each of {len(rewards)} rewards. Received: "
                f"{len(weights)} weights."
            )
        self.weights = [
            check_number("weights", weight, 0.0, MOST_WEIGHT) for weight in weights
        ]
        check_some_weight(**{f"weights[{i}]": w for i, w in enumerate(self.weights)})
        self.needs_features = any(r.needs_features for r in self.rewards)
        self.runs_python = any(r.runs_python for r in self.rewards)
        self.diversity_weight = float(any(r.diversity_weight for r in self.rewards))

    @property
    def block_measures(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of what the summed rewards measure once per block."""
        names = [name for reward in self.rewards for name in reward.block_measures]
        return tuple(dict.fromkeys(names))

    def prepare(self, causal_lm: keras_hub.models.CausalLM) -> None:
        """Prepares every reward."""
        for reward in self.rewards:
            reward.prepare(causal_lm)

    def __call__(
        self, generated: Tensor, target: Tensor, rollouts: Rollouts | None = None
    ) -> dict[str, Tensor]:
        """The sum. `alignment` and `diversity` are the weighted sums of both parts."""
        found = [
            reward.in_parts(reward(generated, target, rollouts), rollouts)
            for reward in self.rewards
        ]
        rank = max(len(rewards["reward"].shape) for rewards in found)
        total: dict[str, Tensor] = {}
        for reward, weight, rewards in zip(self.rewards, self.weights, found):
            for name in reward.block_measures:
                total.setdefault(name, rewards[name])
            for name in ("alignment", "diversity"):
                scale = weight * getattr(reward, f"{name}_weight")
                part = scale * _with_rank(rewards[name], rank)
                total[name] = total[name] + part if name in total else part
        total["reward"] = total["alignment"] - total["diversity"]
        return total

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "rewards": [keras.saving.serialize_keras_object(r) for r in self.rewards],
            "weights": self.weights,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RewardSum":
        """Builds the object from what `get_config` returned."""
        rewards = [
            keras.saving.deserialize_keras_object(r) if isinstance(r, dict) else r
            for r in config["rewards"]
        ]
        return cls(rewards, config["weights"])


def _with_rank(reward: Tensor, rank: int) -> Tensor:
    return reward if len(reward.shape) == rank else reward[..., None]
