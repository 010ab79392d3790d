"""Rewards from a verifier in Python, and sums of rewards."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_ebft import bridge
from keras_ebft.kernels.backend import call_python
from keras_ebft.rewards import Reward
from keras_ebft.validation import (
    check_bool,
    check_instance,
    check_number,
    check_some_weight,
)


class RolloutBatch(NamedTuple):
    """The tokens of a batch of rollouts.

    Attributes:
        documents: `Documents`.
        blocks: `Blocks`.
        token_ids: int32 tensor `[B, n, K, G]`.
        alive: bool tensor `[B, n, K, G]`, tokens up to and with the stop token.
    """

    documents: Any
    blocks: Any
    token_ids: Any
    alive: Any


@keras.saving.register_keras_serializable("keras_ebft")
class VerifierReward(Reward):
    """Reinforcement learning with a verifier (RLVR): a Python function rewards.

    The function runs outside the compiled step, on the host. On TensorFlow the
    step is then not compiled by XLA.

    Args:
        fn: `fn(prompts, completions, targets)` returns numbers `[B, n, K]`.
            `prompts[b][k]` is what block k sees of its document,
            `completions[b][j][k]` what sample j adds, `targets[b][k]` the true text
            of the window. All are strings, without the tokenizer's start and end
            tokens, or lists of all token ids with `decode=False`. In dead blocks
            (padding) all three are empty, and the number is not looked at.
        decode: bool, whether the function gets strings.

    Raises:
        TypeError: if `fn` is not callable.
        ValueError: when an `EBFTModel` is built, if strings are wanted of a model
            without a preprocessor; while training, if `fn` returns another shape
            or numbers that are not finite.

    Example:
    ```python
    def ends_with_a_full_stop(prompts, completions, targets):
        return [
            [[float(text.endswith(".")) for text in sample] for sample in document]
            for document in completions
        ]

    model = keras_ebft.EBFTModel(
        causal_lm,
        sampler=keras_ebft.BlockSampler(anchors="answer_start", rollout_length=64),
        reward=keras_ebft.VerifierReward(ends_with_a_full_stop),
    )
    ```
    """

    needs_features = False
    runs_python = True
    diversity_weight = 0.0

    def __init__(self, fn, decode=True):
        if not callable(fn):
            raise TypeError(
                "Expected `fn` to be a function of (prompts, completions, targets). "
                f"Received: fn={fn!r} (of type {type(fn).__name__})."
            )
        self.fn = fn
        self.decode = check_bool("decode", decode)
        self._tokenizer = None
        self._markers = ()

    def prepare(self, causal_lm):
        """Takes the model's tokenizer, to decode rollouts with."""
        if not self.decode:
            return
        self._tokenizer = bridge.tokenizer(causal_lm)
        if self._tokenizer is None:
            raise ValueError(
                "Expected a CausalLM with a preprocessor, whose tokenizer decodes "
                "rollouts for the verifier. Received: one without. Build the "
                "CausalLM with `preprocessor=`, or use VerifierReward(fn, "
                "decode=False) for token ids."
            )
        self._markers = bridge.marker_token_ids(causal_lm)

    def __call__(self, generated, target, rollouts=None):
        """The verifier's numbers as `reward` and `alignment`; no diversity."""
        documents, blocks = rollouts.documents, rollouts.blocks
        shape = tuple(rollouts.token_ids.shape[:3])
        start = ops.zeros(blocks.live.shape, dtype="int32")
        reward = call_python(
            self._verify,
            shape,
            documents.token_ids,
            start if blocks.starts is None else blocks.starts,
            ops.add(start, blocks.anchors),
            rollouts.token_ids,
            rollouts.alive,
            ops.broadcast_to(blocks.true_index, blocks.true_exists.shape),
            blocks.true_exists,
            blocks.live,
        )
        return {
            "alignment": reward,
            "diversity": ops.zeros_like(reward),
            "reward": reward,
        }

    def _verify(self, token_ids, starts, anchors, rollouts, alive, true, exists, live):
        batch, samples, blocks = rollouts.shape[:3]

        def text(row, tokens):
            return self._text(tokens) if live[row] else self._text(tokens[:0])

        places = [[(b, k) for k in range(blocks)] for b in range(batch)]
        prompts = [
            [text(at, token_ids[at[0], starts[at] : anchors[at]]) for at in row]
            for row in places
        ]
        targets = [
            [text(at, token_ids[at[0], true[at][exists[at]]]) for at in row]
            for row in places
        ]
        completions = [
            [
                [text(at, rollouts[b, j, at[1]][alive[b, j, at[1]]]) for at in row]
                for j in range(samples)
            ]
            for b, row in enumerate(places)
        ]
        found = np.asarray(self.fn(prompts, completions, targets), dtype="float32")
        if found.shape != (batch, samples, blocks):
            raise ValueError(
                "Expected the verifier to return numbers [B, n, K] = "
                f"{[batch, samples, blocks]}, of the shape of `completions`. "
                f"Received: shape {list(found.shape)}."
            )
        found = np.where(live[:, None, :], found, np.float32(0.0))
        if not np.isfinite(found).all():
            raise ValueError(
                "Expected the verifier to return finite numbers. Received: NaN or "
                "infinity. Return 0.0 for what cannot be judged."
            )
        return found

    def _text(self, tokens):
        tokens = [int(token) for token in tokens]
        if not self.decode:
            return tokens
        tokens = [token for token in tokens if token not in self._markers]
        return self._tokenizer.detokenize(tokens) if tokens else ""

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "fn": keras.saving.serialize_keras_object(self.fn),
            "decode": self.decode,
        }

    @classmethod
    def from_config(cls, config):
        """Builds the object from what `get_config` returned."""
        fn = config["fn"]
        if not callable(fn):
            fn = keras.saving.deserialize_keras_object(fn)
        return cls(**{**config, "fn": fn})


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
    >>> from keras_ebft import FeatureMatchingReward
    >>> verifier = VerifierReward(len, decode=False)
    >>> RewardSum([FeatureMatchingReward(), verifier], [1.0, 0.5]).weights
    [1.0, 0.5]
    """

    def __init__(self, rewards, weights=None):
        if not isinstance(rewards, (list, tuple)) or not rewards:
            raise ValueError(
                "Expected `rewards` to be a non-empty list of rewards. Received: "
                f"rewards={rewards!r}."
            )
        remedy = "Pass keras_ebft.FeatureMatchingReward(), for example."
        self.rewards = [check_instance("rewards", r, Reward, remedy) for r in rewards]
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise ValueError(
                f"Expected one weight for each of {len(rewards)} rewards. Received: "
                f"{len(weights)} weights."
            )
        self.weights = [check_number("weights", weight, 0.0) for weight in weights]
        check_some_weight(**{f"weights[{i}]": w for i, w in enumerate(self.weights)})
        self.needs_features = any(r.needs_features for r in self.rewards)
        self.runs_python = any(r.runs_python for r in self.rewards)
        self.diversity_weight = float(any(r.diversity_weight for r in self.rewards))

    @property
    def block_measures(self):
        """Names of what the summed rewards measure once per block."""
        names = [name for reward in self.rewards for name in reward.block_measures]
        return tuple(dict.fromkeys(names))

    def prepare(self, causal_lm):
        """Prepares every reward."""
        for reward in self.rewards:
            reward.prepare(causal_lm)

    def __call__(self, generated, target, rollouts=None):
        """The sum. `alignment` and `diversity` are the weighted sums of both parts."""
        found = [reward(generated, target, rollouts) for reward in self.rewards]
        rank = max(len(rewards["reward"].shape) for rewards in found)
        total = {}
        for reward, weight, rewards in zip(self.rewards, self.weights, found):
            for name in reward.block_measures:
                total.setdefault(name, rewards[name])
            for name in ("alignment", "diversity"):
                scale = weight * getattr(reward, f"{name}_weight")
                part = scale * _with_rank(rewards[name], rank)
                total[name] = total[name] + part if name in total else part
        total["reward"] = total["alignment"] - total["diversity"]
        return total

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "rewards": [keras.saving.serialize_keras_object(r) for r in self.rewards],
            "weights": self.weights,
        }

    @classmethod
    def from_config(cls, config):
        """Builds the object from what `get_config` returned."""
        rewards = [
            keras.saving.deserialize_keras_object(r) if isinstance(r, dict) else r
            for r in config["rewards"]
        ]
        return cls(rewards, config["weights"])


def _with_rank(reward, rank):
    return reward if len(reward.shape) == rank else reward[..., None]
