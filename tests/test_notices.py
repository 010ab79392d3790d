"""What is said of settings under which a term does nothing, and that it is so."""

import itertools
import logging

import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft import functional
from keras_ebft.evaluation import FeatureMatching

# The operations are those of other tests, dispatched one by one.
pytestmark = pytest.mark.on_torch

Reward, Network = keras_ebft.FeatureMatchingReward, keras_ebft.FeatureNetwork
X = documents(2, 12)
LAYERS = {"feature_network": Network(layers=(1,))}


def sampler(**options):
    given = {"rollout_length": 2, "stride": 8, "context_length": 8, "num_samples": 3}
    return keras_ebft.BlockSampler(**{**given, **options})


@pytest.fixture
def said(caplog):
    """Function from the settings of a model to what is said of them."""

    def say(**options):
        caplog.clear()
        options = {"sampler": sampler(), **LAYERS, **options}
        causal_lm = options.pop("causal_lm", None) or llama()
        with caplog.at_level(logging.INFO, logger="keras_ebft"):
            model = keras_ebft.EBFTModel(causal_lm, seed=0, **options)
        return model, [(r.levelname, r.getMessage()) for r in caplog.records]

    return say


def judged(reward, generated, target, advantage="rloo"):
    found = reward.judge(
        ops.convert_to_tensor(generated, "float32"),
        ops.convert_to_tensor(target, "float32"),
        None,
        advantage,
    )
    return {name: to_numpy(value) for name, value in found.items()}


def features(samples, width=6, blocks=5, features=1, seed=0):
    """Unit features of rollouts `[1, n, K, F, D]` and truth."""
    random = np.random.default_rng(seed)
    generated = random.normal(size=(1, samples, blocks, features, width))
    target = random.normal(size=(1, blocks, features, width))
    return tuple(
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (generated, target)
    )


def test_the_papers_settings_are_no_warning_and_said_once(said):
    causal_lm = llama(num_layers=4)
    options = {"causal_lm": causal_lm, "sampler": None, "feature_network": None}
    model, found = said(**options)
    assert [level for level, _ in found] == ["INFO"]
    assert "penalty on duplicates" in found[0][1]
    # Neither again on the same language model, nor by what measures.
    assert said(**options)[1] == []
    FeatureMatching(model)
    assert said(**{**options, "causal_lm": llama(num_layers=4)})[1] == found


def test_nothing_is_said_of_supervised_fine_tuning(caplog):
    with caplog.at_level(logging.INFO, logger="keras_ebft"):
        keras_ebft.EBFTModel.sft(llama(num_layers=1))
    assert not caplog.records


@pytest.mark.parametrize("whitening", ["rollout", "feature"])
def test_whitened_diversity_is_a_penalty_on_duplicates(said, whitening):
    for count in (1, 2):
        generated, target = features(4, features=count)
        reward = Reward(whitening=whitening)
        assert np.abs(judged(reward, generated, target)["diversity"]).max() < 1e-4
        # Unwhitened, it is not constant.
        plain = judged(Reward(whitening=None), generated, target)["diversity"]
        assert np.ptp(plain) > 0.5
        generated[:, 1] = generated[:, 0]
        diversity = judged(reward, generated, target)["diversity"][0]
        assert diversity[:2].min() > 0.3
        assert np.abs(diversity[2:]).max() < 1e-4
    # More rollouts than dimensions always overlap.
    generated, target = features(8)
    assert np.ptp(judged(reward, generated, target)["diversity"]) > 0.1
    *_, (level, text) = said(reward=Reward(whitening=whitening))[1]
    assert (level, "penalty on duplicates" in text) == ("INFO", True)
    *_, (level, text) = said(reward=Reward(0.0, 1.0, whitening))[1]
    assert (level, "there is nothing else" in text) == ("WARNING", True)
    many = sampler(num_samples=20)
    assert said(reward=Reward(whitening=whitening), sampler=many)[1] == []
    assert said(reward=Reward(1.0, 0.0, whitening))[1] == []


@pytest.mark.parametrize(
    ("samples", "advantage", "expected"),
    [(3, "rloo", 0), (2, "rloo", -2), (3, "group_norm", 0)],
)
def test_greedy_rollouts_have_no_advantage(said, samples, advantage, expected):
    greedy = sampler(num_samples=samples, temperature=0.0)
    reward = Reward(whitening=None)
    model, found = said(sampler=greedy, advantage=advantage, reward=reward)
    rollouts = model.rollout(X, seed=0)
    token_ids = to_numpy(rollouts["token_ids"])
    assert (token_ids == token_ids[:, :1]).all()

    def above_expected(model, rollouts):
        """How far advantages are from what is said of them."""
        found = model.rewards(X, rollouts)
        return np.abs(to_numpy(found["advantage"]) - expected).max()

    assert above_expected(model, rollouts) < 1e-5
    assert ("WARNING", True) in [(level, "are the same" in t) for level, t in found]
    outcome = "pushes them all down" if expected else "is 0:"
    assert any(outcome in text for _, text in found)
    hot = sampler(num_samples=samples, temperature=1.0)
    model, found = said(sampler=hot, advantage=advantage, reward=reward)
    assert not any("are the same" in text for _, text in found)
    assert above_expected(model, model.rollout(X, seed=0)) > 1e-2


def test_group_norm_of_two_forgets_the_diversity(said):
    for samples in (2, 3):
        generated, target = features(samples)
        with_it, without = (
            judged(Reward(1.0, w, None), generated, target, "group_norm")["advantage"]
            for w in (1.0, 0.0)
        )
        assert (np.abs(with_it - without).max() < 1e-4) == (samples == 2)
        options = {"sampler": sampler(num_samples=samples), "advantage": "group_norm"}
        found = said(reward=Reward(whitening=None), **options)[1]
        assert any("no effect" in text for _, text in found) == (samples == 2)


def test_taps_that_fall_together(said):
    model, found = said(causal_lm=llama(num_layers=2), feature_network=Network())
    assert model.feature_network.tapped_layers(2) == [1]
    assert "WARNING" in [level for level, _ in found]
    assert any("features come from layer 1 alone" in text for _, text in found)
    found = said(causal_lm=llama(num_layers=3), feature_network=Network())[1]
    assert any("features come from layer 1 and 2 alone" in text for _, text in found)
    found = said(causal_lm=llama(num_layers=4), feature_network=Network())[1]
    assert not any("fall together" in text for _, text in found)


def expected_kl_gradient(estimator):
    """Over all rollouts of two tokens out of three, by the chain rule on paper.

    The policy is a table of logits `[4]` x 3: the first token's, and the second's
    after each first.
    """
    random = np.random.default_rng(0)
    log_p, log_ref = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in random.normal(size=(2, 4, 3))
    )
    total = np.zeros((4, 3))
    for first, second in itertools.product(range(3), repeat=2):
        places = [(0, first), (1 + first, second)]
        probability = np.exp(sum(log_p[place] for place in places))
        for row, token in places:
            d = log_p[row, token] - log_ref[row, token]
            slope = {"k1": 1.0, "k2": d, "k3": 1.0 - np.exp(-d)}[estimator]
            step = 1e-3
            low, high = (
                float(
                    to_numpy(
                        functional.kl_estimate(
                            ops.convert_to_tensor([[d + e]], "float32"),
                            ops.zeros((1, 1)),
                            estimator,
                        )
                    )[0, 0]
                )
                for e in (-step, step)
            )
            assert (high - low) / (2 * step) == pytest.approx(slope, abs=1e-3)
            total[row] += probability * slope * (np.eye(3)[token] - np.exp(log_p[row]))
    return total


def test_the_gradient_of_k1_is_zero_on_average(said):
    assert np.abs(expected_kl_gradient("k1")).max() < 1e-12
    assert np.abs(expected_kl_gradient("k2")).max() > 1e-2
    assert np.abs(expected_kl_gradient("k3")).max() > 1e-2
    options = {"kl_weight": 0.1, "kl_estimator": "k1"}
    assert any("0 on average" in text for _, text in said(**options)[1])
    for other in (
        {"kl_estimator": "k2"},
        {"kl_weight": 0.0},
        {"updates_per_rollout": 2},
    ):
        found = said(**{**options, **other})[1]
        assert not any("0 on average" in text for _, text in found)


def test_lengths_that_weigh_alignment_against_diversity(said):
    # What "concat" pools of four tokens, each of length 1.
    generated, target = features(3, features=4)
    generated, target = (x.reshape(*x.shape[:-2], 1, -1) for x in (generated, target))
    token, pooled, auto = (
        judged(Reward(whitening=None, normalize=n), generated, target)
        for n in ("token", "pooled", "auto")
    )
    np.testing.assert_allclose(token["alignment"], pooled["alignment"], atol=1e-5)
    np.testing.assert_allclose(token["diversity"], 4 * pooled["diversity"], atol=1e-5)
    np.testing.assert_array_equal(auto["reward"], pooled["reward"])
    warned = [
        ({"mode": "stack", "layers": (1, 2)}, "token", True),
        ({"pooling": "concat", "layers": (1,)}, "token", True),
        ({"pooling": "mean", "layers": (1,)}, "token", True),
        ({"pooling": "mean", "layers": (1,)}, "auto", False),
        ({"layers": (1,)}, "token", False),
    ]
    for network, normalize, expected in warned:
        found = said(
            feature_network=Network(**network),
            reward=Reward(whitening=None, normalize=normalize),
        )[1]
        assert any("is a cosine" in text for _, text in found) == expected


def test_lengths_that_turn_an_alignment_round(said):
    """In numbers: `test_rewards.py`."""
    network = Network(layers=(1,), pooling="mean")
    for normalize, expected in (("auto", True), ("pooled", False)):
        found = said(feature_network=network, reward=Reward(normalize=normalize))[1]
        assert any("turned round" in text for _, text in found) == expected


def test_one_rollout_and_whitening(said):
    generated, target = features(1)
    by_whitening = {
        whitening: judged(Reward(1.0, 0.0, whitening), generated, target)["alignment"]
        for whitening in ("rollout", "feature", None)
    }
    plain = by_whitening[None]
    assert np.abs(plain).max() < 1.99
    np.testing.assert_allclose(by_whitening["rollout"], plain, atol=1e-5)
    np.testing.assert_allclose(by_whitening["feature"], 2 * np.sign(plain), atol=1e-5)
    options = {"sampler": sampler(num_samples=1), "advantage": "reinforce"}
    for whitening, level in (("rollout", "INFO"), ("feature", "WARNING")):
        found = said(reward=Reward(1.0, 0.0, whitening), **options)[1]
        assert [le for le, _ in found] == [level]


def test_unused_places(said):
    x = {"token_ids": X, "answer_mask": np.arange(12) >= np.full((2, 1), 5)}
    anchors = []
    for stride in (8, 3):
        at_answers = sampler(anchors="answer_start", stride=stride, stop_token_ids=None)
        model, found = said(sampler=at_answers)
        assert any("changes nothing" in text for _, text in found) == (stride == 3)
        anchors.append(to_numpy(model.rollout(x, seed=0)["anchors"]).tolist())
    assert anchors[0] == anchors[1] == [[5], [5]]


def test_parts_of_sums_are_looked_at(said):
    verifier = keras_ebft.VerifierReward(len, decode=False)
    both = keras_ebft.RewardSum([Reward(0.0, 1.0), verifier])
    assert any("nothing else" in text for _, text in said(reward=both)[1])
    assert said(reward=verifier)[1] == []


def test_a_copy_of_trained_weights_is_no_initial_model(said):
    """The second model's features are those of the tuned weights."""
    causal_lm = llama(num_layers=1)
    first, _ = said(causal_lm=causal_lm)
    assert said(causal_lm=causal_lm)[1] == []
    first.compile(keras.optimizers.SGD(0.0))
    first.fit(X, verbose=0)
    ((level, text),) = said(causal_lm=causal_lm)[1]
    assert (level, "trained before" in text) == ("WARNING", True)
    measured = said(causal_lm=causal_lm, policy_weight=0.0, kl_weight=0.1)[1]
    assert "trained before" in measured[-1][1]


def test_what_does_not_copy_trained_weights_says_nothing(said, caplog):
    causal_lm = llama(num_layers=1)
    first, _ = said(causal_lm=causal_lm)
    first.compile(keras.optimizers.SGD(0.0))
    first.fit(X, verbose=0)
    caplog.clear()
    FeatureMatching(first)
    keras_ebft.EBFTModel.sft(causal_lm)
    assert not caplog.records
    base = Network(layers=(1,), network=llama(num_layers=1).backbone)
    assert said(causal_lm=causal_lm, feature_network=base)[1] == []
    adapted = llama(num_layers=1)
    adapted.backbone.enable_lora(2)
    first, _ = said(causal_lm=adapted)
    first.compile(keras.optimizers.SGD(0.0))
    first.fit(X, verbose=0)
    assert said(causal_lm=adapted)[1] == []
