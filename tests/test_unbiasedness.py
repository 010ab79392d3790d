"""The expected policy gradient is the gradient of the feature-matching loss.

With a vocabulary of 3 and 2 generated tokens there are 9 rollouts. All tuples of
n rollouts are enumerated; the gradients that `fit` would follow, weighted with
the tuples' probabilities, must sum to the gradient of the closed form.
"""

import itertools

import numpy as np
import pytest
from helpers import flat, gradients, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft import functional
from keras_ebft.functional.pooling import unit_length

ROLLOUTS = np.array(list(itertools.product(range(3), repeat=2)), dtype="int32")
DOCUMENT = np.array([[0, 2, 1, 1, 0]], dtype="int32")


def build(samples, **options):
    options.setdefault("feature_network", keras_ebft.FeatureNetwork(layers=(1, 2)))
    return keras_ebft.EBFTModel(
        llama(vocabulary_size=3, hidden_dim=8, intermediate_dim=12),
        sampler=keras_ebft.BlockSampler(
            rollout_length=2, context_length=3, num_samples=samples, temperature=0.6
        ),
        seed=0,
        **options,
    )


def log_prob_of_rollouts(model):
    """Log-probability `[9]` of every rollout, with gradient."""
    rollouts = ROLLOUTS.reshape(1, 9, 1, 2)
    log_prob = model.score(DOCUMENT, rollouts)["log_prob"]
    return ops.reshape(ops.sum(log_prob, axis=-1), (9,))


def closed_form(model):
    """Gradient of |E[phi] - phi_*|^2, of features of length 1."""
    features = model.features(DOCUMENT, ROLLOUTS.reshape(1, 9, 1, 2))
    generated, target = (unit_length(values) for values in features)
    generated = ops.reshape(generated, (9, -1))
    target = ops.reshape(target, (-1,))

    def loss():
        probability = ops.exp(log_prob_of_rollouts(model))
        mean = ops.sum(probability[:, None] * generated, axis=0)
        return ops.sum(ops.square(mean - target))

    return flat(gradients(loss, model.trainable_variables))


def expected_estimate(model, samples):
    """Probability-weighted sum of the policy gradients of all tuples."""
    tuples = np.array(list(itertools.product(range(9), repeat=samples)))
    rollouts = ROLLOUTS[tuples][:, :, None, :]
    documents = np.repeat(DOCUMENT, len(tuples), axis=0)
    advantage = model.rewards(documents, rollouts)["advantage"]
    log_prob = to_numpy(log_prob_of_rollouts(model)).astype("float64")
    assert np.exp(log_prob).sum() == pytest.approx(1.0, abs=1e-5)
    weight = np.exp(log_prob[tuples].sum(axis=1)).astype("float32")
    mask = np.ones(rollouts.shape, dtype="float32")
    # What the loss of each tuple alone would give its tokens, times its probability.
    weights = ops.convert_to_tensor(mask * weight[:, None, None, None] / (2 * samples))

    def loss():
        log_prob = model.score(documents, rollouts)["log_prob"]
        ratio = functional.probability_ratio(log_prob, None, mask)
        return functional.policy_loss(ratio, advantage, weights)

    # The loss averages over the 2 tokens of a rollout.
    return 2.0 * flat(gradients(loss, model.trainable_variables))


@pytest.mark.parametrize(
    ("advantage", "samples"),
    [
        pytest.param("rloo", 2, marks=pytest.mark.numbers),
        ("rloo", 3),
        ("reinforce", 2),
        ("reinforce", 3),
    ],
)
def test_expected_gradient_is_the_closed_form(advantage, samples):
    model = build(
        samples,
        reward=keras_ebft.FeatureMatchingReward(whitening=None),
        advantage=advantage,
    )
    exact = closed_form(model)
    estimate = expected_estimate(model, samples)
    assert np.linalg.norm(exact) > 1e-2
    assert np.linalg.norm(estimate - exact) < 2e-5 * np.linalg.norm(exact)


@pytest.mark.slow_compiled
@pytest.mark.parametrize("normalize", ["auto", "token"])
@pytest.mark.parametrize(
    "network", [{"mode": "stack", "pooling": "mean"}, {"pooling": "concat"}]
)
def test_it_is_so_of_pooled_and_stacked_features(network, normalize):
    """They have another length, unless the reward gives them length 1."""
    model = build(
        2,
        feature_network=keras_ebft.FeatureNetwork(layers=(1, 2), **network),
        reward=keras_ebft.FeatureMatchingReward(whitening=None, normalize=normalize),
    )
    exact = closed_form(model)
    wrong = np.linalg.norm(expected_estimate(model, 2) - exact) / np.linalg.norm(exact)
    assert wrong < 2e-5 if normalize == "auto" else wrong > 0.1


def test_a_biased_estimator_is_told_apart():
    model = build(
        3,
        reward=keras_ebft.FeatureMatchingReward(whitening=None),
        advantage="group_norm",
    )
    exact = closed_form(model)
    estimate = expected_estimate(model, 3)
    assert np.linalg.norm(estimate - exact) > 1e-2 * np.linalg.norm(exact)
