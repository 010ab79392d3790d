"""Truncated and greedy sampling, and what log-probabilities then mean."""

import numpy as np
import pytest
from helpers import documents, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.kernels.linear_sample import linear_sample

# The probabilities of five tokens, written into the head of a one-wide model.
PROBABILITY = np.array([0.08, 0.4, 0.02, 0.3, 0.2])
DRAWS = 2000
UNIFORM = ((np.arange(DRAWS) + 0.5) / DRAWS).astype("float32")


def draw(**options):
    hidden = np.ones((DRAWS, 1), dtype="float32")
    head = np.log(PROBABILITY).astype("float32")[:, None]
    tokens, log_prob = linear_sample(
        *(ops.convert_to_tensor(v) for v in (hidden, head, UNIFORM)), **options
    )
    tokens, log_prob = to_numpy(tokens), to_numpy(log_prob)
    return np.bincount(tokens, minlength=5) / DRAWS, tokens, log_prob


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.35}, [1]),
        ({"top_p": 0.65}, [1, 3]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 0.97}, [0, 1, 3, 4]),
        # Of the three likeliest, of mass 0.9, the fewest that hold 70 %.
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),
        ({"temperature": 0.0}, [1]),
    ],
)
def test_only_what_is_kept_is_drawn(options, kept):
    frequency, tokens, log_prob = draw(**options)
    expected = np.zeros(5)
    expected[kept] = PROBABILITY[kept] / PROBABILITY[kept].sum()
    np.testing.assert_allclose(frequency, expected, atol=1.5 / DRAWS)
    # Log-probabilities are those of the whole distribution.
    np.testing.assert_allclose(log_prob, np.log(PROBABILITY)[tokens], atol=1e-5)


def test_truncation_works_on_tempered_probabilities():
    frequency, tokens, log_prob = draw(temperature=0.5, top_p=0.6)
    tempered = PROBABILITY**2 / np.sum(PROBABILITY**2)
    expected = np.zeros(5)
    expected[[1, 3]] = tempered[[1, 3]] / tempered[[1, 3]].sum()
    np.testing.assert_allclose(frequency, expected, atol=1.5 / DRAWS)
    np.testing.assert_allclose(log_prob, np.log(tempered)[tokens], atol=1e-5)


def test_greedy_rollouts_are_what_generate_would_write():
    causal_lm = llama(num_layers=1)
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(
            rollout_length=3, stride=4, context_length=4, num_samples=2, temperature=0
        ),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=0,
    )
    x = documents(1, 12)
    rollouts = model.rollout(x)
    tokens = to_numpy(rollouts["token_ids"])
    row = np.zeros((1, 12), dtype="int32")
    row[:, :8] = x[:, :8]
    for step in range(3):
        mask = np.ones_like(row)
        logits = to_numpy(causal_lm({"token_ids": row, "padding_mask": mask}))
        row[:, 8 + step] = logits[0, 7 + step].argmax()
    np.testing.assert_array_equal(tokens[0, :, 1], [row[0, 8:11]] * 2)
    # Scored at temperature 1, where sampling has none.
    np.testing.assert_allclose(
        to_numpy(rollouts["log_prob"]),
        to_numpy(model.score(x, rollouts)["log_prob"]),
        atol=2e-5,
    )
