"""Rewards from a verifier in Python."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_ebft.backend.runtime import call_python
from keras_ebft.networks import TextDecoder, tokenizer
from keras_ebft.rewards.reward import Reward
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_bool


class _Arrays(NamedTuple):
    """What texts are made of, on the host."""

    token_ids: np.ndarray  # [B, T]
    starts: np.ndarray  # [B, K]
    anchors: np.ndarray  # [B, K]
    rollouts: np.ndarray  # [B, n, K, G]
    alive: np.ndarray  # [B, n, K, G]
    true_index: np.ndarray  # [B, K, G]
    exists: np.ndarray  # [B, K, G]
    live: np.ndarray  # [B, K]


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
            tokens (`prompt + completion` is how the text goes on), or lists of all
            token ids with `decode=False`. In dead blocks (padding) all three are
            empty, and the number is not looked at.
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

    def __init__(self, fn: Callable[..., Any], decode: bool = True) -> None:
        if not callable(fn):
            raise TypeError(
                "Expected `fn` to be a function of (prompts, completions, targets). "
                f"Received: fn={fn!r} (of type {type(fn).__name__})."
            )
        self.fn = fn
        self.decode = check_bool("decode", decode)
        self._decoder: Any = None

    def prepare(self, causal_lm: keras_hub.models.CausalLM) -> None:
        """Takes the model's tokenizer, to decode rollouts with."""
        if not self.decode:
            return
        known = tokenizer(causal_lm)
        if known is None:
            raise ValueError(
                "Expected a CausalLM with a preprocessor, whose tokenizer decodes "
                "rollouts for the verifier. Received: one without. Build the "
                "CausalLM with `preprocessor=`, or use VerifierReward(fn, "
                "decode=False) for token ids."
            )
        self._decoder = TextDecoder(known)

    def __call__(
        self, generated: Tensor, target: Tensor, rollouts: Any = None
    ) -> dict[str, Tensor]:
        """The verifier's numbers as `reward` and `alignment`; no diversity."""
        blocks = rollouts.blocks.as_tensors()
        starts = ops.zeros_like(blocks.anchors)
        reward = call_python(
            self._verify,
            tuple(rollouts.token_ids.shape[:3]),
            rollouts.documents.token_ids,
            starts if blocks.starts is None else blocks.starts,
            blocks.anchors,
            rollouts.token_ids,
            rollouts.alive,
            blocks.true_index,
            blocks.true_exists,
            blocks.live,
        )
        return {
            "alignment": reward,
            "diversity": ops.zeros_like(reward),
            "reward": reward,
        }

    def _verify(self, *arrays: np.ndarray) -> np.ndarray:
        batch = _Arrays(*arrays)
        shape, live = batch.rollouts.shape[:3], batch.live
        rewards = np.asarray(self.fn(*self._texts(batch)), dtype="float32")
        if rewards.shape != shape:
            raise ValueError(
                "Expected the verifier to return numbers [B, n, K] = "
                f"{list(shape)}, of the shape of `completions`. "
                f"Received: shape {list(rewards.shape)}."
            )
        rewards = np.where(live[:, None, :], rewards, np.float32(0.0))
        if not np.isfinite(rewards).all():
            raise ValueError(
                "Expected the verifier to return finite numbers. Received: NaN or "
                "infinity. Return 0.0 for what cannot be judged."
            )
        return rewards

    def _texts(self, batch: _Arrays) -> tuple[list[Any], list[Any], list[Any]]:
        """Prompts, completions and targets, as `fn` gets them."""
        rows, samples, blocks = batch.rollouts.shape[:3]

        def of_blocks(
            tokens_of: Callable[..., Iterable[Any]], goes_on: bool = True
        ) -> list[Any]:
            return [
                [
                    self._text(tokens_of(b, k) if batch.live[b, k] else (), goes_on)
                    for k in range(blocks)
                ]
                for b in range(rows)
            ]

        prompts = of_blocks(
            lambda b, k: batch.token_ids[b, batch.starts[b, k] : batch.anchors[b, k]],
            goes_on=False,
        )
        targets = of_blocks(
            lambda b, k: batch.token_ids[b, batch.true_index[b, k][batch.exists[b, k]]]
        )
        of_samples = [
            of_blocks(lambda b, k, j=j: batch.rollouts[b, j, k][batch.alive[b, j, k]])
            for j in range(samples)
        ]
        return prompts, [list(samples) for samples in zip(*of_samples)], targets

    def _text(self, tokens: Iterable[Any], goes_on: bool) -> str | list[int]:
        if not self.decode:
            return [int(token) for token in tokens]
        return self._decoder(tokens, goes_on)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "fn": keras.saving.serialize_keras_object(self.fn),
            "decode": self.decode,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VerifierReward":
        """Builds the object from what `get_config` returned."""
        fn = config["fn"]
        if not callable(fn):
            fn = keras.saving.deserialize_keras_object(fn)
        return cls(**{**config, "fn": fn})
