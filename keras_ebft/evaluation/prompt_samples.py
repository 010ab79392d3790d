"""Several completions of every prompt, which is read once for all of them."""

from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np

from keras_ebft.model import EBFTModel
from keras_ebft.networks import (
    check_supported,
    end_token_ids,
    maximum_length,
    to_numpy,
)
from keras_ebft.rewards import VerifierReward
from keras_ebft.samplers import BlockSampler

SEEDS = 2**31


class PromptSamples:
    """Token ids that a model writes after prompts, by block-parallel sampling.

    A prompt is a document with one block, where it ends; all samples of it attend to
    the one reading of it.

    Args:
        causal_lm: `keras_hub.models.CausalLM` of a supported family.
        num_samples: int, per prompt.
        temperature: float above 0.
        batch_size: int, prompts per call of the model.
        seed: int.
        jit_compile: bool or `"auto"`.
    """

    def __init__(
        self,
        causal_lm: keras_hub.models.CausalLM,
        num_samples: int,
        temperature: float,
        batch_size: int,
        seed: int,
        jit_compile: bool | str = "auto",
    ) -> None:
        self.causal_lm = causal_lm
        self.num_samples = num_samples
        self.temperature = temperature
        self.batch_size = batch_size
        self.seed = seed
        self._jit_compile = jit_compile
        # One per number of tokens: each is a program of its own.
        self._models: dict[int, EBFTModel] = {}

    def __call__(
        self, prompts: Sequence[np.ndarray], num_tokens: int
    ) -> list[list[np.ndarray]]:
        """Completes prompts.

        Args:
            prompts: list of int arrays, none empty.
            num_tokens: int, the most that each completion gets.

        Returns:
            list of lists of `num_samples` int arrays, without a stop token.
        """
        model = self._model(num_tokens)
        longest = max(map(len, prompts))
        completions = []
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            filled = batch + [batch[-1]] * (self.batch_size - len(batch))
            rollouts = model.rollout(
                _rows(filled, longest), seed=(self.seed + start) % SEEDS
            )
            token_ids = to_numpy(rollouts["token_ids"])[: len(batch), :, 0]
            written = to_numpy(rollouts["mask"])[: len(batch), :, 0]
            written = written & ~np.isin(token_ids, end_token_ids(self.causal_lm))
            completions += [
                [ids[mask] for ids, mask in zip(*of_prompt)]
                for of_prompt in zip(token_ids, written)
            ]
        return completions

    def _model(self, num_tokens: int) -> EBFTModel:
        if num_tokens not in self._models:
            sampler = BlockSampler(
                rollout_length=num_tokens,
                num_samples=self.num_samples,
                temperature=self.temperature,
                anchors="answer_start",
            )
            # Of all rewards the one that needs no network beside the model.
            reward = VerifierReward(lambda prompt, completion: 0.0)
            model = EBFTModel(self.causal_lm, sampler, reward=reward, seed=0)
            model.compile(jit_compile=self._jit_compile)
            self._models[num_tokens] = model
        return self._models[num_tokens]


def can_share_prompts(causal_lm: keras_hub.models.CausalLM, most_tokens: int) -> bool:
    """Whether `PromptSamples` runs a model.

    Args:
        causal_lm: `keras_hub.models.CausalLM`.
        most_tokens: int, of the longest prompt and the longest completion together.
    """
    try:
        check_supported(causal_lm)
    except ValueError:
        return False
    reached = maximum_length(causal_lm)
    return reached is None or most_tokens <= reached


def _rows(prompts: Sequence[np.ndarray], longest: int) -> dict[str, Any]:
    """Documents of a prompt and an answer of one token, which nothing looks at."""
    shape = len(prompts), longest + 1
    rows = {
        "token_ids": np.zeros(shape, "int32"),
        "padding_mask": np.zeros(shape, bool),
        "answer_mask": np.zeros(shape, bool),
    }
    for index, ids in enumerate(prompts):
        end = len(ids)
        rows["token_ids"][index, :end] = ids
        rows["token_ids"][index, end] = ids[-1]
        rows["padding_mask"][index, : end + 1] = True
        rows["answer_mask"][index, end] = True
    return rows
