"""Verifiers, sums of rewards, and features of whole distributions."""

import keras
import numpy as np
import pytest
from helpers import documents, gradients, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft import functional, kernels

SAMPLER = {"rollout_length": 3, "stride": 4, "context_length": 4, "num_samples": 2}
X = documents(2, 14)
ROLLOUTS = documents(2 * 2 * 2, 3, seed=1).reshape(2, 2, 2, 3)


@keras.saving.register_keras_serializable("tests")
def count_sevens(prompts, completions, targets):
    """How many of a completion's tokens are above 7, per document and sample."""
    return [
        [[sum(t > 7 for t in tokens) for tokens in sample] for sample in document]
        for document in completions
    ]


@pytest.fixture(scope="module")
def policy():
    return llama(num_layers=1)


def build(policy, reward, **sampler):
    return keras_ebft.EBFTModel(
        policy,
        keras_ebft.BlockSampler(**{**SAMPLER, **sampler}),
        keras_ebft.FeatureNetwork(layers=(1,)),
        reward,
        seed=0,
    )


def test_a_verifier_sees_prompts_completions_and_targets(policy):
    seen = {}

    def verifier(prompts, completions, targets):
        seen.update(prompts=prompts, completions=completions, targets=targets)
        return np.arange(8.0).reshape(2, 2, 2)

    model = build(policy, keras_ebft.VerifierReward(verifier, decode=False))
    mask = np.ones((2, 14), dtype=bool)
    mask[1, 8:] = False
    rewards = model.rewards({"token_ids": X, "padding_mask": mask}, ROLLOUTS)
    assert seen["prompts"] == [[X[0, :4].tolist(), X[0, :8].tolist()],
                               [X[1, :4].tolist(), []]]  # fmt: skip
    assert seen["targets"][0] == [X[0, 4:7].tolist(), X[0, 8:11].tolist()]
    assert seen["completions"][1] == [
        [ROLLOUTS[1, 0, 0].tolist(), []],
        [ROLLOUTS[1, 1, 0].tolist(), []],
    ]
    expected = np.arange(8.0).reshape(2, 2, 2)
    expected[1, :, 1] = 0.0
    np.testing.assert_array_equal(to_numpy(rewards["reward"]), expected)
    # Two rollouts: the baseline of each is the other.
    difference = expected[:, :1] - expected[:, 1:]
    np.testing.assert_allclose(
        to_numpy(rewards["advantage"]), np.concatenate([difference, -difference], 1)
    )


def test_a_verifier_reads_strings(byte_lm):
    seen = []

    def verifier(prompts, completions, targets):
        seen.append((prompts, completions, targets))
        return np.zeros((1, 2, 1))

    model = build(
        byte_lm,
        keras_ebft.VerifierReward(verifier),
        anchors="answer_start",
        rollout_length=4,
    )
    tokenizer = byte_lm.preprocessor.tokenizer
    question, answer = (to_numpy(tokenizer(t)).tolist() for t in ("2+3=", "ab"))
    tokens = [tokenizer.start_token_id, *question, *answer, tokenizer.end_token_id]
    x = {"token_ids": np.array([tokens]), "answer_mask": np.zeros((1, len(tokens)))}
    x["answer_mask"][0, -len(answer) - 1 :] = 1
    end = tokenizer.end_token_id
    rollouts = np.array([[[[*answer, end, end, end][:4]], [[*question][:4]]]])
    model.rewards(x, rollouts)
    prompts, completions, targets = seen[-1]
    # Neither start nor end tokens are text.
    assert prompts == [["2+3="]]
    assert targets == [["ab"]]
    assert completions == [[["ab"], ["2+3="]]]


def test_fit_with_a_verifier(policy):
    calls = []

    def verifier(prompts, completions, targets):
        calls.append(len(completions))
        return count_sevens(prompts, completions, targets)

    model = build(policy, keras_ebft.VerifierReward(verifier, decode=False))
    model.compile(keras.optimizers.SGD(0.01))
    history = model.fit(X, batch_size=1, validation_data=X, verbose=0).history
    assert calls == [1, 1, 1, 1], "once per step"
    assert 0.0 < history["reward"][0] < 3.0
    assert history["diversity"] == [0.0]
    assert "feature_matching_loss" not in history
    assert model.frozen_network is None, "nothing looks at features"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((2, 2)), r"\[2, 2, 2\].*\[2, 2\]"),
        (np.full((2, 2, 2), np.nan), "finite"),
    ],
)
def test_a_verifier_must_answer_properly(policy, answer, message):
    reward = keras_ebft.VerifierReward(lambda *_: answer, decode=False)
    with pytest.raises(Exception, match=message):
        build(policy, reward).rewards(X, ROLLOUTS)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="XLA calls Python on JAX only"
)
def test_xla_on_tensorflow_cannot_call_a_verifier(policy):
    model = build(policy, keras_ebft.VerifierReward(count_sevens, decode=False))
    with pytest.raises(ValueError, match="jit_compile=True"):
        model.compile("sgd", jit_compile=True)
    model.compile("sgd")
    assert not model.jit_compile


def test_a_sum_is_the_sum(policy):
    matching = keras_ebft.FeatureMatchingReward(0.5, 0.25)
    verifier = keras_ebft.VerifierReward(count_sevens, decode=False)
    total = keras_ebft.RewardSum([matching, verifier], [2.0, 0.1])
    found, one, two = (
        {k: to_numpy(v) for k, v in build(policy, r).rewards(X, ROLLOUTS).items()}
        for r in (total, matching, verifier)
    )
    for name in ("reward", "advantage"):
        np.testing.assert_allclose(
            found[name], 2.0 * one[name] + 0.1 * two[name], atol=1e-5
        )
    np.testing.assert_allclose(found["diversity"], 0.5 * one["diversity"], atol=1e-6)
    same = keras_ebft.RewardSum.from_config(total.get_config())
    assert same.get_config() == total.get_config()


def test_fourier_features_estimate_the_gaussian_kernel():
    """With many frequencies, psi(x) . psi(y) = exp(-|x - y|^2 / (2 bandwidth^2))."""
    random = np.random.default_rng(0)
    generated = random.normal(size=(1, 3, 1, 1, 5)).astype("float32") / 2
    target = random.normal(size=(1, 1, 1, 5)).astype("float32") / 2
    reward = keras_ebft.CharacteristicFunctionReward(
        num_frequencies=200_000, bandwidth=0.8
    )
    found = {k: to_numpy(v) for k, v in reward(generated, target).items()}

    def kernel(one, two):
        return np.exp(-np.sum((one - two) ** 2) / (2 * 0.8**2))

    rollouts, truth = generated[0, :, 0, 0], target[0, 0, 0]
    alignment = [2 * kernel(x, truth) for x in rollouts]
    diversity = [
        sum(kernel(x, y) for j, y in enumerate(rollouts) if j != i)
        for i, x in enumerate(rollouts)
    ]
    np.testing.assert_allclose(found["alignment"][0, :, 0], alignment, atol=1e-2)
    np.testing.assert_allclose(found["diversity"][0, :, 0], diversity, atol=1e-2)
    pairs = sum(kernel(x, y) for x in rollouts for y in rollouts) / 9
    distance = pairs - np.mean(alignment) + 1.0
    assert found["feature_matching_loss"][0, 0] == pytest.approx(distance, abs=1e-2)


def test_equal_means_are_told_apart_by_the_characteristic_function():
    generated = np.array([[1.0, 0.0], [-1.0, 0.0]]).reshape(1, 2, 1, 1, 2)
    target = np.zeros((1, 1, 1, 2))
    plain = keras_ebft.FeatureMatchingReward(whitening=None)
    assert to_numpy(plain(generated, target)["feature_matching_loss"])[0, 0] == 0.0
    reward = keras_ebft.CharacteristicFunctionReward()
    found = to_numpy(reward(generated, target)["feature_matching_loss"])
    assert found[0, 0] > 0.05
    same = keras_ebft.CharacteristicFunctionReward.from_config(reward.get_config())
    np.testing.assert_array_equal(same.frequencies(2), reward.frequencies(2))


def test_a_reward_must_be_defined():
    with pytest.raises(TypeError, match="define __call__"):
        keras_ebft.Reward()(None, None)


def features_of(samples, *lead):
    random = np.random.default_rng(0)
    generated = random.normal(size=(2, samples, 3, *lead, 1, 6)).astype("float32")
    return generated, random.normal(size=(2, 3, *lead, 1, 6)).astype("float32")


@pytest.mark.parametrize("estimator", ["rloo", "group_norm", "reinforce"])
# One reward per block, and one per token.
@pytest.mark.parametrize("lead", [(), (2,)])
def test_judging_is_rewarding_and_then_the_baseline(estimator, lead):
    reward = keras_ebft.FeatureMatchingReward(0.7, 0.4)
    generated, target = features_of(4, *lead)
    judged = reward.judge(generated, target, None, estimator)
    rewards = reward(generated, target)
    assert judged.keys() == rewards.keys() | {"advantage"}
    assert judged["advantage"].shape == (2, 4, 3, *lead)
    for name, value in rewards.items():
        np.testing.assert_array_equal(to_numpy(judged[name]), to_numpy(value))
    expected = functional.advantages(
        rewards["alignment"],
        rewards["diversity"],
        alignment_weight=0.7,
        diversity_weight=0.4,
        estimator=estimator,
    )
    np.testing.assert_allclose(to_numpy(judged["advantage"]), to_numpy(expected))


class Doubled(keras_ebft.FeatureMatchingReward):
    """Rewards of its own."""

    def __call__(self, generated, target, rollouts=None):
        rewards = super().__call__(generated, target, rollouts)
        return {**rewards, "alignment": 2.0 * rewards["alignment"]}


class Seven(keras_ebft.FeatureMatchingReward):
    """A baseline of its own."""

    def advantages(self, rewards, estimator):
        return 0.0 * rewards["reward"] + 7.0


def test_a_subclass_is_judged_by_what_it_defines():
    generated, target = features_of(3)
    plain = keras_ebft.FeatureMatchingReward(diversity_weight=0.0)
    expected = to_numpy(plain.judge(generated, target, None, "rloo")["advantage"])
    doubled = Doubled(diversity_weight=0.0).judge(generated, target, None, "rloo")
    np.testing.assert_allclose(to_numpy(doubled["advantage"]), 2 * expected, atol=1e-6)
    seven = Seven().judge(generated, target, None, "rloo")
    assert (to_numpy(seven["advantage"]) == 7.0).all()


def test_rewards_have_no_gradient():
    generated, target = features_of(3)
    features = keras.Variable(generated)
    reward = keras_ebft.FeatureMatchingReward()

    def loss():
        found = reward(features.value, target)
        return ops.sum(found["reward"]) + 2.0 * ops.sum(features.value)

    (gradient,) = gradients(loss, [features])
    np.testing.assert_array_equal(to_numpy(gradient), np.full(generated.shape, 2.0))


def test_more_samples_than_kernels_take():
    *fast, _ = kernels.implementations("feature_reward")
    assert not any("many_samples" in record.options for record in fast)
    with kernels.watch_choices() as choices:
        rewards = keras_ebft.FeatureMatchingReward()(*features_of(17))
    assert choices == {"feature_reward": {"reference"}}
    assert np.isfinite(to_numpy(rewards["reward"])).all()


def test_normalize_is_saved_and_old_configurations_load():
    for kind in (
        keras_ebft.FeatureMatchingReward,
        keras_ebft.CharacteristicFunctionReward,
    ):
        reward = kind(whitening=None, normalize="token")
        same = kind.from_config(reward.get_config())
        assert same.get_config() == reward.get_config()
        assert not same.normalizes_pooled
        old = reward.get_config()
        del old["normalize"]
        assert kind.from_config(old).normalizes_pooled
        assert not kind.from_config({**old, "whitening": "rollout"}).normalizes_pooled
        assert kind(normalize="pooled").normalizes_pooled
    with pytest.raises(ValueError, match="`normalize` to be one of"):
        keras_ebft.FeatureMatchingReward(normalize="l2")


def test_unwhitened_features_have_length_one_together():
    random = np.random.default_rng(0)
    generated, target = (
        random.normal(size=(2, 3, 4, 2, 5)),
        random.normal(size=(2, 4, 2, 5)),
    )
    generated[0, 1, 2] = 0.0

    def unit(x):
        norm = np.sqrt((x**2).sum((-2, -1), keepdims=True))
        return x / np.maximum(norm, 1e-12)

    def rewards(generated, target, **options):
        found = keras_ebft.FeatureMatchingReward(**options)(
            ops.convert_to_tensor(generated, "float32"),
            ops.convert_to_tensor(target, "float32"),
        )
        return {name: to_numpy(value) for name, value in found.items()}

    found = rewards(generated, target, whitening=None)
    x, t = unit(generated).reshape(2, 3, 4, -1), unit(target).reshape(2, 4, -1)
    alignment = 2 * np.einsum("bjkd,bkd->bjk", x, t)
    gram = np.einsum("bikd,bjkd->bijk", x, x)
    diversity = gram.sum(1) - np.einsum("bjjk->bjk", gram)
    loss = ((x.mean(1) - t) ** 2).sum(-1)
    np.testing.assert_allclose(found["alignment"], alignment, atol=1e-5)
    np.testing.assert_allclose(found["diversity"], diversity, atol=1e-5)
    np.testing.assert_allclose(found["feature_matching_loss"], loss, atol=1e-5)
    raw = rewards(generated, target, whitening=None, normalize="token")
    assert np.abs(raw["diversity"] - diversity).max() > 1.0
    # With whitening nothing has changed.
    one = rewards(generated, target)
    other = rewards(generated, target, normalize="token")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    # Token by token, each token's features together.
    tokens = np.repeat(generated[:, :, :, None], 2, axis=3)
    true = np.repeat(target[:, :, None], 2, axis=2)
    by_token = rewards(tokens, true, whitening=None)
    np.testing.assert_allclose(by_token["diversity"][..., 1], diversity, atol=1e-5)


def test_with_whitening_lengths_can_turn_an_alignment_round():
    """Two features in one plane: the truth, and one that is nearly it but longer."""
    truth, longer = [1.0, 0.0], [1.1, 0.05]
    generated = ops.reshape(ops.convert_to_tensor([truth, longer]), (1, 2, 1, 1, 2))
    target = ops.reshape(ops.convert_to_tensor(truth), (1, 1, 1, 2))

    def alignment(normalize):
        reward = keras_ebft.FeatureMatchingReward(normalize=normalize)
        return to_numpy(reward(generated, target)["alignment"]).ravel()

    # M^(1/2) = (M + s I) / sqrt(tr M + 2 s), s = sqrt(det M), on paper. The target
    # is scaled by the sums of the rows of its inverse, in proportion to
    # [1.1^2 + .05^2 + s - 1.1, 1 + s - 1.1]: the second is negative.
    s, trace = 0.05, 1.0 + 1.1**2 + 0.05**2
    expected = 2 * np.array([1.0 + s, -1.1]) / np.sqrt(trace + 2 * s)
    np.testing.assert_allclose(alignment("token"), expected, atol=1e-4)
    first, second = alignment("pooled")
    assert first > second + 0.05
    assert second > 1.0


@keras.saving.register_keras_serializable("tests")
class Sevens(keras_ebft.Reward):
    """A reward of one's own: one number per rollout, and nothing to configure."""

    needs_features = False

    def __call__(self, generated, target, rollouts=None):
        return ops.sum(ops.cast(rollouts.token_ids == 7, "float32"), axis=-1)


@keras.saving.register_keras_serializable("tests")
class WrongShape(Sevens):
    def __call__(self, generated, target, rollouts=None):
        return ops.sum(super().__call__(generated, target, rollouts), axis=1)


class Scaled(Sevens):
    def __init__(self, scale):
        self.scale = scale


class Partial(Sevens):
    def __call__(self, generated, target, rollouts=None):
        return {"reward": super().__call__(generated, target, rollouts)}


SIXTEEN = documents(2, 16)


def test_a_reward_may_be_one_tensor(policy):
    model = build(policy, Sevens())
    rollouts = model.rollout(SIXTEEN, seed=0)
    found = {n: to_numpy(v) for n, v in model.rewards(SIXTEEN, rollouts).items()}
    expected = (to_numpy(rollouts["token_ids"]) == 7).sum(axis=-1)
    np.testing.assert_array_equal(found["reward"], expected)
    np.testing.assert_array_equal(found["diversity"], 0.0 * expected)
    count = expected.shape[1]
    others = (expected.sum(axis=1, keepdims=True) - expected) / (count - 1)
    np.testing.assert_allclose(found["advantage"], expected - others, atol=1e-6)
    both = keras_ebft.RewardSum([Sevens(), Sevens()], [1.0, 0.5])
    summed = build(policy, both).rewards(SIXTEEN, rollouts)
    np.testing.assert_allclose(to_numpy(summed["reward"]), 1.5 * expected, atol=1e-6)


def test_a_reward_of_another_shape_or_without_parts_is_refused(policy):
    for reward, message in (
        (WrongShape(), r"WrongShape.*\[B, n, K\].*Received: shape"),
        (Partial(), "Partial.*without alignment, diversity"),
    ):
        model = build(policy, reward)
        rollouts = model.rollout(SIXTEEN, seed=0)
        with pytest.raises(ValueError, match=message):
            model.rewards(SIXTEEN, rollouts)


def test_a_reward_without_arguments_needs_no_configuration(policy):
    config = keras.saving.serialize_keras_object(Sevens())
    assert isinstance(keras.saving.deserialize_keras_object(config), Sevens)
    assert repr(Sevens()) == "Sevens()"
    with pytest.raises(TypeError, match=r"Scaled to define get_config.*scale"):
        Scaled(2.0).get_config()
