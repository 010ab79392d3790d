"""What training changed, on rollouts drawn once and weighed anew."""

import itertools

import keras
import numpy as np
import pytest
from helpers import documents, llama, randomise

import keras_ebft
from keras_ebft.evaluation import FeatureMatching, PairedFeatureMatching, paired_change
from keras_ebft.evaluation.paired import (
    _scores,
    _token_match,
    weighted_mean,
    weighted_pairs,
)

# Arithmetic on what `rollout`, `features` and `score` return on every backend.
pytestmark = pytest.mark.on_torch

X = documents(6, 18)


def build(causal_lm, **sampler):
    sampler = keras_ebft.BlockSampler(
        **{"rollout_length": 2, "stride": 4, "context_length": 4, **sampler}
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    # What is measured knows no whitening.
    reward = keras_ebft.FeatureMatchingReward(whitening=None)
    return keras_ebft.EBFTModel(causal_lm, sampler, network, reward, seed=0)


def nudge(causal_lm, scale):
    random = np.random.default_rng(3)
    weights = causal_lm.get_weights()
    causal_lm.set_weights([w + scale * random.normal(size=w.shape) for w in weights])


def test_expectations_over_every_draw_are_those_of_the_other_distribution():
    """All 81 draws of 4 samples from a space of 3."""
    drawn, wanted = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    vectors = np.array([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.0]])
    mean = pairs = 0.0
    for tokens in itertools.product(range(3), repeat=4):
        draw = np.array(tokens)
        probability = drawn[draw].prod()
        weights = (wanted / drawn)[draw]
        products = vectors[draw] @ vectors[draw].T
        mean += probability * weighted_mean(vectors[draw, 0], weights)
        pairs += probability * weighted_pairs(products, weights)
    expected = wanted @ vectors
    assert mean == pytest.approx(expected[0], abs=1e-12)
    assert pairs == pytest.approx(expected @ expected, abs=1e-12)
    # What it would be without weights is another number.
    assert abs(expected @ expected - drawn @ vectors @ vectors.T @ drawn) > 0.3


def test_by_hand():
    assert weighted_mean(np.array([1.0, 2.0, 6.0]), np.ones(3)) == pytest.approx(3.0)
    # (2 * 1 - 1 * 4 + 2 + 6) / 3
    weights = np.array([2.0, 1.0, 1.0])
    assert weighted_mean(np.array([1.0, 2.0, 6.0]), weights) == pytest.approx(2.0)
    products = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 4.0], [2.0, 4.0, 9.0]])
    assert weighted_pairs(products, np.ones(3)) == pytest.approx(7 / 3)
    # (2 * 2 * 1 + 2 * 2 * 2 + 2 * 4) / 6 - 2 / 3 * 4
    assert weighted_pairs(products, weights) == pytest.approx(20 / 6 - 8 / 3)


def test_where_nothing_changed_it_is_the_plain_measure():
    model = build(llama())
    measure = PairedFeatureMatching(model, X, num_samples=100, batch_size=4)
    first, second = measure(), measure()
    for name, values in first.items():
        assert values.shape == (6,)
        np.testing.assert_array_equal(values, second[name])
        assert paired_change(values, second[name]) == (0.0, 0.0)
    assert measure.effective_samples == 1.0
    plain = FeatureMatching(model, rollout_lengths=(2,), num_samples=100, seed=1)(X)
    expected = plain["unbiased_feature_matching_loss@2"]
    assert first["feature_matching_loss"].mean() == pytest.approx(expected, abs=0.02)
    assert first["alignment"].mean() == pytest.approx(plain["alignment@2"], abs=0.02)
    assert first["cross_entropy"].mean() == pytest.approx(plain["ce_loss"], rel=1e-5)


def test_a_change_is_that_of_new_rollouts_with_less_noise():
    """Against 800 rollouts of its own per block, where 400 are weighed."""
    causal_lm = llama()
    model = build(causal_lm)
    exact = FeatureMatching(model, rollout_lengths=(2,), num_samples=800)
    measure = PairedFeatureMatching(model, X, num_samples=400, batch_size=6)
    before, plain = measure(), exact(X)
    nudge(causal_lm, 0.02)
    after, moved = measure(), exact(X)
    assert 0.6 < measure.effective_samples < 1.0
    for name, plain_name in (
        ("feature_matching_loss", "unbiased_feature_matching_loss@2"),
        ("alignment", "alignment@2"),
    ):
        expected = moved[plain_name] - plain[plain_name]
        found = paired_change(before[name], after[name]).mean
        assert abs(expected) > 0.01
        assert found == pytest.approx(expected, abs=0.006)
    expected = moved["ce_loss"] - plain["ce_loss"]
    found = paired_change(before["cross_entropy"], after["cross_entropy"])
    assert found.mean == pytest.approx(expected, rel=1e-4)


def test_tokens_are_compared_with_the_documents():
    causal_lm = llama()
    model = build(causal_lm)
    measure = PairedFeatureMatching(model, X, num_samples=3, batch_size=6)
    rollouts = {
        name: keras.ops.convert_to_numpy(value)
        for name, value in measure._model.rollout(X, seed=0).items()
    }
    shares = []
    for row, anchors in enumerate(rollouts["anchors"]):
        of_row = [
            np.mean(rollouts["token_ids"][row, sample, block] == X[row, a : a + 2])
            for block, a in enumerate(anchors)
            for sample in range(3)
        ]
        shares.append(np.mean(of_row))
    np.testing.assert_allclose(measure()["token_match"], shares, atol=1e-12)


def test_masks():
    """Padding, documents of a row, and answers count as in training."""
    mask = np.ones(X.shape, bool)
    mask[0, 12:] = False
    mask[1, 4:] = False
    segments = np.where(np.arange(18) < 9, 1, 2) * np.ones((6, 1), "int32")
    answers = np.arange(18) >= 5
    x = {
        "token_ids": X,
        "padding_mask": mask,
        "segment_ids": (segments * mask).astype("int32"),
        "answer_mask": answers & mask,
    }
    model = build(llama())
    found = PairedFeatureMatching(model, x, num_samples=3, batch_size=6)()
    # The second row holds no block, and none of its answers.
    for values in found.values():
        assert np.isnan(values).tolist() == [False, True] + [False] * 4
    counts = x["answer_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1])
    scores = model.score(x, model.rollout(x, seed=0))["document_log_prob"]
    log_prob = keras.ops.convert_to_numpy(keras.ops.stop_gradient(scores))
    with np.errstate(invalid="ignore"):
        expected = -(log_prob * counts).sum(1) / counts.sum(1)
    np.testing.assert_allclose(found["cross_entropy"], expected, rtol=1e-5)


def test_tokens_that_do_not_count_are_weighed():
    """All 49 rollouts of two tokens, the first of which is no answer."""
    vocabulary = 7
    causal_lm = llama(vocabulary_size=vocabulary, num_layers=1)
    every = np.array(list(itertools.product(range(vocabulary), repeat=2)), "int32")
    x = {
        "token_ids": documents(1, 6) % vocabulary,
        "anchors": np.array([[3]]),
        "answer_mask": np.array([[0, 0, 0, 0, 1, 1]], bool),
    }
    model = build(causal_lm, num_samples=len(every), temperature=1.0)
    rollouts = dict(model.rollout(x, seed=0))
    assert keras.ops.convert_to_numpy(rollouts["mask"])[0, 0].tolist() == [
        [False, True]
    ]
    rollouts["token_ids"] = keras.ops.convert_to_tensor(every[None, :, None])
    rows = PairedFeatureMatching(model, x, num_samples=3)._batches[0].rows

    def probabilities():
        log_prob = model.score(x, rollouts["token_ids"])["log_prob"]
        log_prob = keras.ops.convert_to_numpy(keras.ops.stop_gradient(log_prob))
        return np.exp(log_prob.astype("float64").sum(-1)[0, :, 0])

    before, old = probabilities(), _scores(model, rows, rollouts)[0]
    nudge(causal_lm, 0.1)
    after, new = probabilities(), _scores(model, rows, rollouts)[0]
    assert before.sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(np.exp(new - old)[0, 0], after / before, rtol=1e-4)
    assert np.abs(after / before - 1.0).max() > 0.1


def test_tokens_beyond_the_truth_match_nothing():
    """A document that ends one token into its block; the next one goes on alike."""
    stops = {"stop_token_ids": (6,), "num_samples": 3, "rollout_length": 3}
    model = build(llama(num_layers=1), **stops)
    x = {
        "token_ids": X[:1, :12],
        "padding_mask": np.ones((1, 12), bool),
        "segment_ids": (np.arange(12) >= 9)[None].astype("int32"),
        "anchors": np.array([[8]]),
    }
    rollouts = {
        name: keras.ops.convert_to_numpy(value)
        for name, value in model.rollout(x, seed=0).items()
    }
    rollouts["token_ids"] = np.broadcast_to(
        x["token_ids"][:, None, None, 8:11], rollouts["token_ids"].shape
    ).copy()
    rollouts["token_ids"][0, 0, 0, 0] += 1
    rollouts["mask"] = np.ones_like(rollouts["mask"])
    assert rollouts["true_exists"].tolist() == [[[True, False, False]]]
    found = _token_match(x["token_ids"], rollouts, rollouts["anchors"])
    np.testing.assert_array_equal(found, [[[0.0, 1.0, 1.0]]])


def test_a_change_and_its_interval():
    change = paired_change(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]))
    # 1.96 * sqrt(5 / 3) / 2
    assert change.mean == 2.5
    assert change.half_width == pytest.approx(1.2652, abs=1e-4)
    assert change.is_visible
    assert not paired_change(np.zeros(4), np.array([-4.0, 2.0, 3.0, 1.0])).is_visible
    assert paired_change(np.zeros(1), np.ones(1)) == (1.0, np.inf)


def test_what_cannot_be_weighed_is_refused():
    for options in ({"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=rf"whole distribution.*{name}="):
            PairedFeatureMatching(build(llama(), **options), X)
    sampler = keras_ebft.BlockSampler(rollout_length=2)
    network = keras_ebft.FeatureNetwork(layers=(1,), pooling="token")
    model = keras_ebft.EBFTModel(llama(), sampler, network)
    with pytest.raises(ValueError, match=r"whole windows.*pooling"):
        PairedFeatureMatching(model, X)
    with pytest.raises(ValueError, match=r"num_samples.*3.*2"):
        PairedFeatureMatching(build(llama()), X, num_samples=2)
    with pytest.raises(ValueError, match=r"same documents"):
        paired_change(np.zeros(3), np.zeros(4))


def test_other_trainers_of_the_same_weights_are_measured():
    causal_lm = randomise(llama(), scale=0.2)
    measure = PairedFeatureMatching(build(causal_lm), X, num_samples=4, batch_size=4)
    before = measure()
    sft = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    sft.compile(keras.optimizers.SGD(0.1))
    sft.fit(X, batch_size=6, epochs=4, verbose=0)
    change = paired_change(before["cross_entropy"], measure()["cross_entropy"])
    assert change.mean < 0
    assert change.is_visible
