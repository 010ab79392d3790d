"""Trained to the end, the model is the initial one times an energy's exponential.

With a vocabulary of 3 and 2 generated tokens there are 9 rollouts, whose features and
probabilities are all known. The fixed point is computed from them alone, by iteration
(docs/options.md derives it), and `fit` must arrive there.
"""

import itertools

import keras
import numpy as np
import pytest
from helpers import llama, to_numpy

import keras_ebft
from keras_ebft.functional.pooling import unit_length

DOCUMENT = np.array([[0, 2, 1, 1, 0]], dtype="int32")
STEPS, ROWS, SAMPLES, RATE = 120, 16, 32, 0.03


def build(length, kl_weight):
    return keras_ebft.EBFTModel(
        llama(vocabulary_size=3, hidden_dim=8, intermediate_dim=12),
        keras_ebft.BlockSampler(
            rollout_length=length,
            context_length=3,
            num_samples=SAMPLES,
            temperature=1.0,
        ),
        keras_ebft.FeatureNetwork(layers=(1, 2)),
        keras_ebft.FeatureMatchingReward(whitening=None),
        kl_weight=kl_weight,
        seed=0,
    )


def probabilities(model, length):
    """Of every rollout, float64 `[3] * length`."""
    rollouts = np.array(list(itertools.product(range(3), repeat=length)), "int32")
    document = DOCUMENT[:, : 3 + length]
    log_prob = model.score(document, rollouts.reshape(1, -1, 1, length))["log_prob"]
    log_prob = to_numpy(log_prob).astype("float64").sum(axis=-1)
    return np.exp(log_prob).reshape([3] * length), rollouts


def fixed_point(initial, features, truth, kl_weight, token_by_token):
    """`p0 exp(-(2 / beta) <E_p phi - phi_*, phi>)` that agrees with itself.

    Args:
        initial: float64 `[3] * length`, p0.
        features: float64 `[3] * length + [D]`.
        truth: float64 `[D]`.
        kl_weight: float, beta.
        token_by_token: bool, whether a token is moved by what it can expect,
            without what later tokens' divergence costs: the gradient of `L_KL`.
    """
    policy = initial
    for _ in range(4000):
        mean = np.tensordot(policy, features, axes=policy.ndim)
        energy = 2 * features @ (mean - truth) / kl_weight
        if policy.ndim == 2 and token_by_token:
            second = initial / initial.sum(axis=1, keepdims=True) * np.exp(-energy)
            second /= second.sum(axis=1, keepdims=True)
            first = initial.sum(axis=1) * np.exp(-(second * energy).sum(axis=1))
            found = first[:, None] * second
        else:
            found = initial * np.exp(-energy)
        policy = 0.95 * policy + 0.05 * found / found.sum()
    return policy


def distance(one, other):
    """Total variation."""
    return 0.5 * np.abs(one - other).sum()


def train(length, kl_weight):
    """The initial and the trained policy, and features of rollouts and truth."""
    model = build(length, kl_weight)
    document = DOCUMENT[:, : 3 + length]
    initial, rollouts = probabilities(model, length)
    features = model.features(document, rollouts.reshape(1, -1, 1, length))
    generated, target = (to_numpy(unit_length(f)).astype("float64") for f in features)
    rate = keras.optimizers.schedules.CosineDecay(RATE, STEPS)
    model.compile(keras.optimizers.Adam(rate))
    rows = np.repeat(document, ROWS * STEPS, axis=0)
    model.fit(rows, batch_size=ROWS, verbose=0)
    trained, _ = probabilities(model, length)
    return initial, trained, generated.reshape(*initial.shape, -1), target.ravel()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "kl_weight"),
    [(1, 0.3), pytest.param(2, 0.3, marks=pytest.mark.compiled)],
)
def test_training_ends_at_the_energys_fixed_point(length, kl_weight):
    initial, trained, features, truth = train(length, kl_weight)
    assert trained.sum() == pytest.approx(1.0, abs=1e-5)
    expected = fixed_point(initial, features, truth, kl_weight, token_by_token=True)
    assert distance(trained, expected) < 0.01
    # It has gone far, and another weight would have ended elsewhere.
    assert distance(trained, initial) > 0.1
    for other in (0.8 * kl_weight, 1.25 * kl_weight):
        elsewhere = fixed_point(initial, features, truth, other, token_by_token=True)
        assert distance(trained, elsewhere) > 0.015


def test_the_fixed_point_is_where_the_gradient_is_zero():
    """In a table of probabilities: the expected gradient of both losses, on paper."""
    random = np.random.default_rng(0)
    initial = np.exp(random.normal(size=(3, 3)))
    initial /= initial.sum()
    features, truth = random.normal(size=(3, 3, 5)), random.normal(size=5)
    first = initial.sum(axis=1, keepdims=True)
    logs = {"first": np.log(first), "second": np.log(initial / first)}
    for token_by_token in (True, False):
        policy = fixed_point(initial, features, truth, 8.0, token_by_token)
        mean = np.tensordot(policy, features, axes=2)
        energy = 2 * features @ (mean - truth) / 8.0
        first = policy.sum(axis=1, keepdims=True)
        d_first = np.log(first) - logs["first"]
        d_second = np.log(policy / first) - logs["second"]
        # sum_y p(y) (energy + d_t) d log p(y_t) / d logits, of each token.
        slope = policy * (energy + d_first)
        of_first = slope.sum(axis=1) - first[:, 0] * slope.sum()
        slope = policy * (energy + d_second)
        of_second = slope - policy / first * slope.sum(axis=1, keepdims=True)
        assert np.abs(of_second).max() < 1e-9
        # Whole rollouts would be moved by later tokens' divergence too.
        whole = policy * (energy + d_first + d_second)
        of_whole = whole.sum(axis=1) - first[:, 0] * whole.sum()
        zero, other = (of_first, of_whole) if token_by_token else (of_whole, of_first)
        assert np.abs(zero).max() < 1e-9
        assert np.abs(other).max() > 1e-3
