"""Completions of prompts, for metrics of texts."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_ebft.configurable import Shown
from keras_ebft.evaluation.feature_matching import jit_compile_of
from keras_ebft.evaluation.models import causal_lm_of
from keras_ebft.evaluation.prompt_samples import PromptSamples, can_share_prompts
from keras_ebft.model import EBFTModel
from keras_ebft.networks import TextDecoder, to_numpy
from keras_ebft.validation import check_int, check_temperature


class TextGenerator(Shown):
    """Completes prompts with a model, in batches of one size.

    `prompt + completion` is how the text goes on: with SentencePiece a blank that a
    completion begins with stays. Ids that the tokenizer does not know are no text.

    Several samples of a prompt share one reading of it, in families that this library
    trains: block-parallel sampling with a block where the prompt ends. One sample, and
    the rest, is written by KerasHub's `generate`.

    Args:
        model: `EBFTModel` or `keras_hub.models.CausalLM` with a preprocessor. How
            it is compiled, and its own sampler, are left as they are.
        max_length: int, tokens of prompt and completion together.
        num_samples: int, completions per prompt.
        temperature: float, 0 for the most likely token.
        batch_size: int, completions per call of the model.
        seed: int, decides the samples of every call anew.
        max_new_tokens: int, the most tokens of a completion, or `None` for as many as
            `max_length` leaves.

    Raises:
        TypeError: for another kind of model or value.
        ValueError: for a value out of range, several greedy samples, or a model
            without a preprocessor.

    Example:
    ```python
    generate = keras_ebft.evaluation.TextGenerator(model, max_length=256)
    generate(["def fib(n):"])[0][0]
    ```
    """

    def __init__(
        self,
        model: EBFTModel | keras_hub.models.CausalLM,
        max_length: int,
        num_samples: int = 1,
        temperature: float = 0.0,
        batch_size: int = 16,
        seed: int = 0,
        max_new_tokens: int | None = None,
    ) -> None:
        self.causal_lm = causal_lm_of(model)
        if self.causal_lm.preprocessor is None:
            raise ValueError(
                "Expected a model with a preprocessor, which reads and writes strings. "
                "Received: one without. Build the CausalLM with `preprocessor=`."
            )
        self.max_length = check_int("max_length", max_length, 2)
        self.num_samples = check_int("num_samples", num_samples, 1)
        self.temperature = check_temperature(temperature)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.seed = check_int("seed", seed, 0)
        self.max_new_tokens = (
            None
            if max_new_tokens is None
            else check_int("max_new_tokens", max_new_tokens, 1)
        )
        if self.temperature == 0.0 and self.num_samples > 1:
            raise ValueError(
                "Expected a temperature above 0 for several samples, which would be "
                f"equal. Received: num_samples={num_samples}. Raise `temperature`."
            )
        self._samples = PromptSamples(
            self.causal_lm,
            self.num_samples,
            self.temperature,
            batch_size=max(self.batch_size // self.num_samples, 1),
            seed=self.seed,
            jit_compile=jit_compile_of(model),
        )
        self._sampler = _sampler(self.temperature, self.seed)
        self._sampler_start = [
            np.array(ops.convert_to_numpy(v)) for v in self._sampler.variables
        ]
        self._generate_function = None
        self._decoder = TextDecoder(self.causal_lm.preprocessor.tokenizer)

    def __call__(self, prompts: Sequence[str]) -> list[list[str]]:
        """Completes prompts with the weights as they are now.

        Args:
            prompts: list of strings.

        Returns:
            list of lists of `num_samples` strings, without the prompts.

        Raises:
            ValueError: if there is no prompt.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(
                "Expected a list of at least one prompt. Received: "
                f"{prompts!r}. Pass a list."
            )
        if self.num_samples > 1:
            sampled = self._sampled(prompts)
            if sampled is not None:
                return sampled
        texts = [prompt for prompt in prompts for _ in range(self.num_samples)]
        completions = self._complete(texts)
        return [
            completions[start : start + self.num_samples]
            for start in range(0, len(texts), self.num_samples)
        ]

    @property
    def _most_new_tokens(self) -> int:
        return self.max_new_tokens or self.max_length

    def _sampled(self, prompts: Sequence[str]) -> list[list[str]] | None:
        """Samples that share a reading of their prompt; `None` where they cannot."""
        tokens = self.causal_lm.preprocessor.generate_preprocess(
            list(prompts), sequence_length=self.max_length
        )
        masks = to_numpy(tokens["padding_mask"]).astype(bool)
        ids = [row[mask] for row, mask in zip(to_numpy(tokens["token_ids"]), masks)]
        lengths = [len(row) for row in ids]
        room = [min(self.max_length - n, self._most_new_tokens) for n in lengths]
        most = max(1, *room)
        if not min(lengths) or not can_share_prompts(
            self.causal_lm, max(lengths) + most
        ):
            return None
        return [
            [self._text(completion[:end]) for completion in completions]
            for end, completions in zip(room, self._samples(ids, most))
        ]

    def _complete(self, texts: list[str]) -> list[str]:
        causal_lm = self.causal_lm
        kept = {
            name: getattr(causal_lm, name, None)
            for name in ("sampler", "generate_function")
        }
        for variable, value in zip(self._sampler.variables, self._sampler_start):
            variable.assign(value)
        causal_lm.sampler = self._sampler
        # Compiled in the first call.
        causal_lm.generate_function = self._generate_function
        completions = []
        try:
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                filled = batch + [batch[-1]] * (self.batch_size - len(batch))
                with self._own_texts():
                    written = causal_lm.generate(
                        filled, max_length=self.max_length, strip_prompt=True
                    )
                completions += written[: len(batch)]
            self._generate_function = causal_lm.generate_function
        finally:
            for name, own in kept.items():
                setattr(causal_lm, name, own)
        return completions

    @contextlib.contextmanager
    def _own_texts(self) -> Iterator[None]:
        """Context in which `generate` makes texts of tokens as this class says."""
        preprocessor = self.causal_lm.preprocessor
        # Past the trackers of Keras, which would keep it.
        object.__setattr__(preprocessor, "generate_postprocess", self._texts)
        try:
            yield
        finally:
            object.__delattr__(preprocessor, "generate_postprocess")

    def _texts(self, written: dict[str, Any]) -> list[str]:
        kept = to_numpy(written["padding_mask"]).astype(bool)
        token_ids = to_numpy(written["token_ids"])
        return [
            self._text(ids[mask][: self._most_new_tokens])
            for ids, mask in zip(token_ids, kept)
        ]

    def _text(self, token_ids: np.ndarray) -> str:
        special = getattr(self._decoder.tokenizer, "special_token_ids", ())
        kept = token_ids[~np.isin(token_ids, list(special))]
        return self._decoder(kept, goes_on=True)


def _sampler(temperature: float, seed: int) -> keras_hub.samplers.Sampler:
    if temperature == 0.0:
        return keras_hub.samplers.GreedySampler()
    return keras_hub.samplers.RandomSampler(temperature=temperature, seed=seed)
