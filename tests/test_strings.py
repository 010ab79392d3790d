"""Documents as strings, through the causal language model's own preprocessor."""

import numpy as np
import pytest
from helpers import llama, to_numpy

import keras_ebft
from keras_ebft.training.token_rows import to_token_rows

TEXTS = ["def f(x): return", "abab", "a much longer text that has to be cut somewhere"]


def test_strings_become_whole_documents(byte_lm):
    tokenizer = byte_lm.preprocessor.tokenizer
    rows = to_token_rows(TEXTS, byte_lm)
    assert rows["token_ids"].shape == (3, 24)
    for text, ids, mask in zip(TEXTS, rows["token_ids"], rows["padding_mask"]):
        expected = [
            tokenizer.start_token_id,
            *np.array(to_numpy(tokenizer(text))).tolist(),
            tokenizer.end_token_id,
        ][:24]
        expected[-1] = ids[len(expected) - 1] if len(expected) == 24 else expected[-1]
        assert ids[mask].tolist() == expected


def test_rows_end_with_the_longest_text(byte_lm):
    assert to_token_rows(TEXTS[:2], byte_lm)["token_ids"].shape == (2, 18)
    stream = to_token_rows(TEXTS[:2], byte_lm, trim=False)
    assert stream["token_ids"].shape == (2, 24)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda t: [*map(str.encode, t)]]
)
def test_every_kind_of_string_container(byte_lm, kind):
    expected = to_token_rows(TEXTS, byte_lm)["token_ids"]
    rows = to_token_rows(kind(TEXTS), byte_lm)["token_ids"]
    np.testing.assert_array_equal(rows, expected)


def test_fit_and_generate(byte_lm):
    model = keras_ebft.EBFTModel(
        byte_lm,
        keras_ebft.BlockSampler(rollout_length=3, stride=5, context_length=4),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=0,
    )
    model.compile()
    history = model.fit(TEXTS, batch_size=2, validation_data=TEXTS[:1], verbose=0)
    assert np.isfinite(history.history["val_feature_matching_loss"][0])


def test_without_a_preprocessor():
    with pytest.raises(ValueError, match=r"preprocessor.*token_ids"):
        to_token_rows(["text"], llama())
