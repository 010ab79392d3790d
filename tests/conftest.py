"""Shared fixtures: reference vectors and the tiny checkpoints they were made with."""

import functools
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import tokenizers

import keras_ebft

DATA = Path(__file__).parent / "data"
CLASSES = {
    "llama": keras_hub.models.LlamaCausalLM,
    "gpt2": keras_hub.models.GPT2CausalLM,
}


SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


class Pipeline:
    """One reference run of the authors' code, and our model on its checkpoint."""

    def __init__(self, family):
        self.family = family
        self.values = np.load(DATA / f"pipeline_{family}.npz")
        backbone = keras_hub.models.Backbone.from_preset(str(DATA / family))
        self.causal_lm = CLASSES[family](backbone)
        self.prompt = self.values["prompt"]
        self.generated = self.values["generated"]

    def sampler(self):
        _, context_length, _, stride, *_ = (int(v) for v in self.values["config"])
        return keras_ebft.ReplaySampler(
            self.generated,
            stride=stride,
            context_length=context_length,
            temperature=float(self.values["temperature"]),
        )

    @functools.cached_property
    def default_model(self):
        """One model for all tests that need no options: it compiles once."""
        return self.model(ce_weight=0.03)

    def model(self, **options):
        return keras_ebft.EBFTModel(
            self.causal_lm, sampler=self.sampler(), seed=0, **options
        )


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def pipeline(request):
    return Pipeline(request.param)


@pytest.fixture(scope="session")
def reward_vectors():
    return np.load(DATA / "rewards.npz")


@pytest.fixture(scope="session")
def layout_vectors():
    return np.load(DATA / "layout.npz")


@pytest.fixture(scope="session")
def byte_lm():
    """A Llama that reads bytes."""
    alphabet = [
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        *SPECIAL,
    ]
    tokenizer = keras_hub.models.Llama3Tokenizer(
        vocabulary={token: index for index, token in enumerate(alphabet)},
        merges=["a b"],
    )
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(alphabet),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=24
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=preprocessor)
