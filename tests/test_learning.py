"""Each method learns what it is for, in seconds, on languages that are known."""

import itertools

import keras
import numpy as np
import pytest
from helpers import llama, to_numpy

import keras_ebft

VOCABULARY = 4
ROLLOUTS = np.array(list(itertools.product(range(VOCABULARY), repeat=2)), dtype="int32")
# The language: 1 2 3 1 2 3 ..., wherever it begins.
PERIOD = np.array([1, 2, 3])
DOCUMENTS = np.stack([np.resize(np.roll(PERIOD, shift), 9) for shift in range(3)])
DOCUMENTS = DOCUMENTS.astype("int32")


def policy():
    return llama(vocabulary_size=VOCABULARY)


def exact_loss(model):
    """Feature-matching loss with every rollout of every block enumerated."""
    batch, blocks = len(DOCUMENTS), model.sampler.geometry(9).num_blocks
    shape = (batch, len(ROLLOUTS), blocks, 2)
    every = np.broadcast_to(ROLLOUTS[None, :, None], shape)
    log_prob = to_numpy(model.score(DOCUMENTS, every)["log_prob"]).sum(axis=-1)
    probability = np.exp(log_prob)
    np.testing.assert_allclose(probability.sum(axis=1), 1.0, atol=1e-4)
    generated, target = (to_numpy(f) for f in model.features(DOCUMENTS, every))
    mean = np.sum(probability[..., None, None] * generated, axis=1)
    return np.mean(np.sum((mean - target) ** 2, axis=(-1, -2)))


def fit(model, epochs, learning_rate=0.02):
    model.compile(keras.optimizers.Adam(learning_rate))
    x = np.tile(DOCUMENTS, (4, 1))
    return model.fit(x, batch_size=12, epochs=epochs, verbose=0).history


@pytest.mark.not_on_tensorflow
@pytest.mark.parametrize(
    "whitening", [pytest.param(None, marks=pytest.mark.on_torch), "rollout"]
)
def test_ebft_halves_the_exact_feature_matching_loss(whitening):
    model = keras_ebft.EBFTModel(
        policy(),
        keras_ebft.BlockSampler(
            rollout_length=2, stride=2, context_length=3, num_samples=4, temperature=1.0
        ),
        keras_ebft.FeatureNetwork(layers=(1, 2)),
        keras_ebft.FeatureMatchingReward(whitening=whitening),
        seed=0,
    )
    before = exact_loss(model)
    fit(model, epochs=30)
    after = exact_loss(model)
    assert before > 0.05
    assert after < 0.5 * before


@pytest.mark.not_on_tensorflow
def test_rlvr_solves_its_task():
    """Count on in steps of two, modulo 3: one rollout in sixteen at random."""

    def next_of(token):
        return (token + 1) % 3 + 1

    def verifier(prompts, completions, targets):
        return [
            [
                [
                    float(tokens == [next_of(p[-1]), next_of(next_of(p[-1]))])
                    for p, tokens in zip(row, sample)
                ]
                for sample in document
            ]
            for row, document in zip(prompts, completions)
        ]

    model = keras_ebft.EBFTModel(
        policy(),
        keras_ebft.BlockSampler(
            rollout_length=2, stride=1, context_length=3, num_samples=8, temperature=1.0
        ),
        reward=keras_ebft.VerifierReward(verifier, decode=False),
        entropy_weight=0.02,
        seed=0,
    )
    history = fit(model, epochs=40, learning_rate=0.01)
    assert history["reward"][0] < 0.2
    assert history["reward"][-1] > 0.9


def test_sft_learns_the_language():
    model = keras_ebft.EBFTModel.sft(policy(), seed=0)
    history = fit(model, epochs=40)
    # Only a document's first token cannot be known, and it is never predicted;
    # the second can, from the first.
    assert history["ce_loss"][0] > 1.0
    assert history["ce_loss"][-1] < 0.1
