"""Strings in and text out, through the preprocessor of every family."""

import keras
import numpy as np
import pytest
from helpers import to_numpy
from text_models import FAMILIES, LENGTH, TEXTS, text_model

import keras_ebft
from keras_ebft.networks import TextDecoder
from keras_ebft.training.token_rows import to_token_rows

# One of each route, where a step compiles for a minute.
COMPILED = ("Llama3", "Gemma3", "Mixtral", "GptOss")
# RWKV-7 says that kernels of a package of its own would be faster.
pytestmark = pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package:UserWarning")


@pytest.mark.parametrize("name", FAMILIES)
def test_strings_become_whole_documents(name):
    causal_lm = text_model(name)
    preprocessor = causal_lm.preprocessor
    tokenizer = preprocessor.tokenizer
    rows = to_token_rows(TEXTS, causal_lm)
    lengths = []
    for text, ids, mask in zip(TEXTS, rows["token_ids"], rows["padding_mask"]):
        expected = np.array(to_numpy(tokenizer(text))).ravel().tolist()
        assert len(expected) > 4
        if name != "RWKV7":
            if preprocessor.add_start_token and tokenizer.start_token_id is not None:
                expected.insert(0, tokenizer.start_token_id)
            expected.append(tokenizer.end_token_id)
        lengths.append(len(expected))
        assert ids[mask].tolist() == expected
    assert rows["token_ids"].shape == (2, max(lengths))
    # A text too long is cut, and fills the row.
    cut = to_token_rows([3 * TEXTS[0]], causal_lm)
    assert cut["padding_mask"].all()
    assert cut["token_ids"].shape == (1, LENGTH)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_become_strings(name):
    """Also RWKV-7's, whose tokenizer reads tokens in batches alone."""
    tokenizer = text_model(name).preprocessor.tokenizer
    token_ids = np.array(to_numpy(tokenizer(TEXTS[0]))).ravel().tolist()
    decode = TextDecoder(tokenizer)
    assert decode(token_ids) == TEXTS[0]
    assert decode([]) == ""
    whole = decode(token_ids[:3]) + decode(token_ids[3:], goes_on=True)
    assert whole == TEXTS[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.compiled if n in COMPILED else ())
        for n in FAMILIES
    ],
)
def test_training_on_strings_and_generating(name):
    causal_lm = text_model(name)
    sampler = keras_ebft.BlockSampler(rollout_length=2, stride=5, context_length=4)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(causal_lm, sampler, network, seed=0)
    model.compile(keras.optimizers.SGD(0.01))
    before = causal_lm.get_weights()
    history = model.fit(list(TEXTS), batch_size=2, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())
    assert any((a != b).any() for a, b in zip(before, causal_lm.get_weights()))
    text = causal_lm.generate("abab", max_length=10)
    # RWKV-7's writes the continuation alone.
    assert isinstance(text, str)
    assert "abab" in text or name == "RWKV7"
