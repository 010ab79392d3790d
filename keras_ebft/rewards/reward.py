"""The base class of rewards: rollouts in, rewards of every rollout out.

To add a reward, do:

1. write a subclass of `Reward` in a file of this folder (for your own project:
   anywhere);
2. return `alignment`, `diversity` and `reward`, or one tensor of rewards, from
   `__call__(generated, target, rollouts)`; the class below says shapes, and what may
   be declared;
3. register it with `keras.saving.register_keras_serializable("keras_ebft")` and, if its
   constructor has arguments, return them from `get_config`;
4. add its name to `__init__.py` of this folder and of the package;
5. add numbers by hand to `tests/test_rewards.py` and its equation to `docs/options.md`.
"""

from typing import Any

import keras_hub
from keras import ops

from keras_ebft import functional
from keras_ebft.configurable import Configurable
from keras_ebft.records import Rollouts
from keras_ebft.typing import Tensor

PARTS = ("alignment", "diversity", "reward")


class Reward(Configurable):
    """Base class of rewards.

    A subclass of one's own defines `__call__(generated, target, rollouts)`, which
    returns a dict of float32 tensors `[B, n, K]`: `alignment`, the part of each
    rollout's reward that no other rollout of its block enters; `diversity`, the
    part that sums over pairs of rollouts (0 if there is none); and `reward`, their
    weighted difference. Baselines need the two apart. Further entries `[B, K]`,
    named in `block_measures`, are measured and averaged by `fit`. Or it returns one
    tensor `[B, n, K]`, the rewards, where there is no diversity. A class whose
    constructor has no arguments needs no `get_config`.

    Attributes:
        needs_features: whether `generated` and `target` are used at all.
        runs_python: whether it calls Python code that cannot be compiled.
        block_measures: names of its own measures per block.
        alignment_weight, diversity_weight: the two parts' weights in `reward`.
    """

    needs_features = True
    runs_python = False
    block_measures: tuple[str, ...] = ()
    alignment_weight = 1.0
    diversity_weight = 1.0

    def prepare(self, causal_lm: keras_hub.models.CausalLM) -> None:
        """Called once with the model whose rollouts will be rewarded."""

    def __call__(
        self, generated: Tensor, target: Tensor, rollouts: Rollouts | None = None
    ) -> dict[str, Tensor]:
        """Rewards of every rollout.

        Args:
            generated: float tensor `[B, n, K, F, D]`, features of the rollouts;
                `None` if `needs_features` is false.
            target: float tensor `[B, K, F, D]`, features of the true texts.
            rollouts: `keras_ebft.records.Rollouts`: their tokens, blocks and documents.
        """
        raise TypeError(
            f"Expected {type(self).__name__} to define __call__(generated, target, "
            "rollouts). See keras_ebft.rewards.Reward."
        )

    def judge(
        self,
        generated: Tensor,
        target: Tensor,
        rollouts: Rollouts | None,
        estimator: str,
    ) -> dict[str, Tensor]:
        """Rewards and advantages of every rollout, as a step uses them.

        Args:
            generated: as `__call__` takes it.
            target: as `__call__` takes it.
            rollouts: as `__call__` takes them.
            estimator: name of the baseline.

        Returns:
            What `__call__` returns, and `advantage`.
        """
        rewards = self.in_parts(self(generated, target, rollouts), rollouts)
        return {**rewards, "advantage": self.advantages(rewards, estimator)}

    def in_parts(
        self, returned: Any, rollouts: Rollouts | None = None
    ) -> dict[str, Tensor]:
        """What `__call__` returned as a dict of the reward's parts.

        Args:
            returned: dict, or a tensor of rewards `[B, n, K]`.
            rollouts: the `Rollouts` that were rewarded, whose shape it must have.

        Raises:
            ValueError: for a dict that lacks a part, or a tensor of another shape.
        """
        if isinstance(returned, dict):
            missing = [name for name in PARTS if name not in returned]
            if missing:
                raise ValueError(
                    f"Expected {type(self).__name__} to return {', '.join(PARTS)}, or "
                    f"one tensor of rewards. Received: a dict with {list(returned)}, "
                    f"without {', '.join(missing)}."
                )
            return returned
        alignment = ops.cast(ops.convert_to_tensor(returned), "float32")
        if rollouts is not None:
            shape = tuple(rollouts.token_ids.shape)
            if tuple(alignment.shape) not in (shape, shape[:3]):
                raise ValueError(
                    f"Expected {type(self).__name__} to return rewards [B, n, K] = "
                    f"{list(shape[:3])}, one for every rollout. Received: shape "
                    f"{list(alignment.shape)}."
                )
        return {
            "alignment": alignment,
            "diversity": ops.zeros_like(alignment),
            "reward": self.alignment_weight * alignment,
        }

    def advantages(self, rewards: dict[str, Tensor], estimator: str) -> Tensor:
        """Advantages of what `__call__` returned, of the shape of its rewards.

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
