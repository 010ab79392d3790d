"""The terms of the loss against hand-computed numbers and the authors' code."""

from pathlib import Path

import numpy as np
import pytest
from helpers import gradients, to_numpy, value_and_gradients
from keras import Variable, ops

from keras_ebft import functional
from keras_ebft.functional.masking import masked_mean, only_where
from keras_ebft.layout.blocks import Blocks
from keras_ebft.objectives.critic import SELECTIONS, critic_accuracy, critic_loss
from keras_ebft.objectives.objective import Objective
from keras_ebft.records import (
    DocumentScores,
    Experience,
    FrozenReading,
    Judged,
    Rollouts,
    RolloutScores,
)

LOG_PROB = np.log(np.array([[[[0.5, 0.25], [0.1, 0.2]]]], dtype="float32"))
OLD = np.log(np.array([[[[0.25, 0.25], [0.4, 0.1]]]], dtype="float32"))
MASK = np.array([[[[1, 1], [0, 1]]]], dtype="float32")


def compare(found, expected, **tolerance):
    tolerance = tolerance or {"atol": 1e-6}
    np.testing.assert_allclose(to_numpy(found), expected, **tolerance)


def test_tokens_are_averaged_within_sequences_first():
    mask = np.zeros((2, 2, 2, 2), dtype="float32")
    mask[0, 0] = [[1, 1], [1, 0]]
    mask[1, 1, 0, 1] = 1
    expected = np.zeros_like(mask)
    expected[0, 0] = [[1 / 6, 1 / 6], [1 / 6, 0]]
    expected[1, 1, 0, 1] = 1 / 2
    compare(functional.token_weights(mask), expected)
    compare(functional.token_weights(0 * mask), 0 * mask)


def test_documents_of_one_row_are_sequences_of_their_own():
    mask = np.array([[[[1, 1], [1, 1], [1, 0]]]], dtype="float32")
    starts = ops.convert_to_tensor(np.array([[0, 0, 9]], dtype="int32"))
    expected = [[[[1 / 8, 1 / 8], [1 / 8, 1 / 8], [1 / 2, 0]]]]
    compare(functional.token_weights(mask, starts), expected)


def test_ratio_of_tokens_and_of_rollouts():
    compare(functional.probability_ratio(LOG_PROB, None, MASK), np.ones((1, 1, 2, 2)))
    ratio = functional.probability_ratio(LOG_PROB, OLD, MASK)
    # What does not count is not looked at.
    compare(ratio, [[[[2.0, 1.0], [1.0, 2.0]]]])
    ratio = functional.probability_ratio(LOG_PROB, OLD, MASK, "sequence")
    # The second rollout counts its last token only.
    compare(ratio, [[[[2.0**0.5, 2.0**0.5], [2.0, 2.0]]]])


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_gradient_of_the_ratio(kind):
    """d ratio_t / d logp_s, contracted with numbers that tell tokens apart."""
    weight = np.array([[[[3.0, 1.0], [7.0, 2.0]]]], dtype="float32")
    log_prob = Variable(LOG_PROB)
    (gradient,) = gradients(
        lambda: ops.sum(
            ops.multiply(
                functional.probability_ratio(log_prob.value, None, MASK, kind), weight
            )
        ),
        [log_prob],
    )
    expected = {
        "token": weight * MASK,
        "sequence": np.array([[[[2.0, 2.0], [0.0, 9.0]]]]),
    }[kind]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_policy_loss_by_hand():
    weights = MASK / 3
    ratio = np.array([[[[2.0, 0.5], [9.0, 2.0]]]], dtype="float32")
    advantage = np.array([[[2.0, -1.0]]], dtype="float32")
    loss = functional.policy_loss(ratio, advantage, weights)
    compare(loss, -(4.0 + 1.0 - 2.0) / 3)
    # Good news is not pushed beyond the range, bad news is not believed less.
    clipped = functional.policy_loss(ratio, advantage, weights, clip_range=(0.2, 0.3))
    compare(clipped, -(2.6 + 1.0 - 2.0) / 3)
    per_token = np.array([[[[1.0, 2.0], [np.nan, 3.0]]]], dtype="float32")
    compare(functional.policy_loss(ratio, per_token, weights), -(2.0 + 1.0 + 6.0) / 3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_of_the_authors(estimator):
    vectors = np.load(Path(__file__).parent / "data" / "kl.npz")
    found = functional.kl_estimate(vectors["logp"], vectors["base"], estimator)
    np.testing.assert_allclose(to_numpy(found), vectors[estimator], rtol=0, atol=1e-5)


def test_kl_estimates_are_clipped():
    far = np.float32([-30.0, 30.0])
    compare(functional.kl_estimate(far, 0 * far, "k1"), [-10.0, 10.0])
    compare(functional.kl_estimate(far, 0 * far, "k2"), [10.0, 10.0])


# What a masked token may say: nothing of it reaches a gradient.
MASKED = [-1e4, -np.inf, np.inf, np.nan]


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("masked", MASKED)
def test_masked_tokens_reach_no_gradient_of_the_policy_loss(kind, masked):
    advantage = np.array([[[2.0, -1.0]]], dtype="float32")

    def gradient(value, old_value):
        values, old = LOG_PROB.copy(), OLD.copy()
        values[0, 0, 1, 0], old[0, 0, 1, 0] = value, old_value
        log_prob = Variable(values)

        def loss():
            ratio = functional.probability_ratio(log_prob.value, old, MASK, kind)
            return functional.policy_loss(ratio, advantage, MASK / 3, (0.2, 0.2))

        return gradients(loss, [log_prob])[0]

    expected = gradient(-1.0, -1.0)
    assert np.isfinite(expected).all() and expected.any()
    np.testing.assert_array_equal(gradient(masked, -1.0), expected)
    np.testing.assert_array_equal(gradient(-1.0, masked), expected)


def value_and_gradient_of(function, values):
    variable = Variable(values)
    value, (gradient,) = value_and_gradients(
        lambda: function(variable.value), [variable]
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()
    return value, gradient


@pytest.mark.parametrize("masked", MASKED)
def test_masked_values_reach_no_mean(masked):
    """Of a function whose derivative there is infinite, too."""
    values = LOG_PROB.copy()

    def mean(log_prob):
        replaced = ops.exp(only_where(MASK, log_prob))
        return masked_mean(replaced, MASK) + masked_mean(log_prob, MASK)

    expected, slope = value_and_gradient_of(mean, values)
    assert expected == pytest.approx((0.95 + np.log(0.025)) / 3)
    compare(slope, MASK * (np.exp(LOG_PROB) + 1) / 3)
    values[0, 0, 1, 0] = masked
    found, gradient = value_and_gradient_of(mean, values)
    assert found == expected
    np.testing.assert_array_equal(gradient, slope)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("masked", [-np.inf, np.nan])
def test_masked_logits_reach_nothing_of_a_critic(selection, masked):
    """One rollout of the first block, and all of the second, its truth too."""
    mask = np.float32([[[1, 0], [1, 0], [0, 0]]])
    # The truth of two blocks, and three rollouts of each.
    logits = np.float32([[[0.5, 0.0], [-1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    others = logits.copy()
    others[:, 0, 1] = masked
    others[:, 1:][mask == 0] = masked

    def loss(values):
        return critic_loss(values[:, 0], values[:, 1:], mask, selection)

    expected, slope = value_and_gradient_of(loss, logits)
    chosen = {"first": [-1.0], "closest": [2.0]}.get(selection, [-1.0, 2.0])
    log_sigmoid = [-np.log1p(np.exp(-value)) for value in (*chosen, 0.5)]
    assert expected == pytest.approx(np.mean(log_sigmoid[:-1]) - log_sigmoid[-1])
    found, gradient = value_and_gradient_of(loss, others)
    assert found == expected
    np.testing.assert_array_equal(gradient, slope)
    truth, rollouts = map(ops.convert_to_tensor, (others[:, 0], others[:, 1:]))
    compare(critic_accuracy(truth, rollouts, mask), 0.75)


def experience_of(old, reference):
    """Rollouts of which `MASK` counts."""
    anchors = np.array([1, 3])
    counted = ops.ones((1, 2, 2), "bool")
    blocks = Blocks(anchors, None, counted[..., 0], counted, None, counted, counted)
    advantage = np.float32([[[2.0, -1.0]]])
    return Experience(
        Rollouts(None, blocks, None, ops.convert_to_tensor(MASK > 0)),
        FrozenReading(reference_log_prob=ops.convert_to_tensor(reference)),
        Judged(None, None, None, advantage, None, {}),
        ops.convert_to_tensor(old),
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("masked", MASKED)
def test_masked_tokens_reach_no_term_of_the_loss(estimator, masked):
    """All of them hang on the same log-probabilities, as all do on the weights."""
    objective = Objective(1.0, 0.1, 0.1, 0.01, estimator, "token", 2, None)
    plain = {"policy": LOG_PROB, "entropy": -LOG_PROB, "reference": OLD, "old": OLD}

    def loss_with(value):
        given = {name: array.copy() for name, array in plain.items()}
        for array in given.values():
            array[0, 0, 1, 0] = value
        experience = experience_of(given["old"], given["reference"])

        def loss(log_prob):
            mask = ops.convert_to_tensor(MASK.reshape(1, 4))
            documents = DocumentScores(ops.reshape(log_prob, (1, 4)), mask)
            entropy = log_prob + ops.convert_to_tensor(given["entropy"])
            scores = RolloutScores(log_prob, entropy)
            return objective.loss(objective.terms(documents, experience, scores), 0)

        return value_and_gradient_of(loss, given["policy"])

    expected, slope = loss_with(-1.0)
    assert np.count_nonzero(slope) == 3
    found, gradient = loss_with(masked)
    assert found == expected
    np.testing.assert_array_equal(gradient, slope)


@pytest.mark.parametrize("clip_range", [None, (0.2, 0.2)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_ratios_that_overflow_have_a_finite_loss_and_gradient(clip_range, sign):
    log_prob = Variable(np.zeros((1, 1, 1, 2), "float32"))
    old = np.array([[[[-200.0, 0.0]]]], dtype="float32")
    ones = np.ones((1, 1, 1, 2), "float32")

    def loss():
        ratio = functional.probability_ratio(log_prob.value, old, ones)
        advantage = np.full((1, 1, 1), sign, "float32")
        return functional.policy_loss(ratio, advantage, ones / 2, clip_range)

    assert np.isfinite(to_numpy(loss()))
    (gradient,) = gradients(loss, [log_prob])
    compare(gradient, [[[[0.0, -sign / 2]]]])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_clipped_kl_estimates_have_no_gradient(estimator):
    log_prob = Variable(np.float32([-300.0, -1.0, -2.0]))
    reference = np.float32([-1.0, -300.0, -1.0])
    (gradient,) = gradients(
        lambda: ops.sum(functional.kl_estimate(log_prob.value, reference, estimator)),
        [log_prob],
    )
    slope = {"k1": 1.0, "k2": -1.0, "k3": 1.0 - np.e}[estimator]
    compare(gradient, [0.0, 0.0, slope])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.kl_estimate(OLD, OLD, "k4"), r"kl_estimator.*k1.*'k4'"),
        (
            lambda: functional.probability_ratio(OLD, OLD, MASK, "block"),
            r"policy_loss.*sequence.*'block'",
        ),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()
