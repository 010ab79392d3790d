import itertools

import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

from keras_ebft import FeatureMatchingReward, functional
from keras_ebft.functional.inner_products import feature_inner_products, whiten

CASES = range(8)
TOLERANCE = 1e-5


def compare(ours, theirs):
    np.testing.assert_allclose(to_numpy(ours), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whitened", [0, 1])
def test_rewards_equal_the_authors_code(reward_vectors, case, whitened):
    prefix = f"{case}_whiten{whitened}"
    for index, (alignment, diversity) in enumerate(reward_vectors["coefs"]):
        weights = {
            "alignment_weight": float(alignment),
            "diversity_weight": float(diversity),
        }
        rewards = functional.feature_matching_rewards(
            reward_vectors[f"{case}_generated"],
            reward_vectors[f"{case}_target"],
            whitening="rollout" if whitened else None,
            **weights,
        )
        compare(rewards.alignment, reward_vectors[f"{prefix}_alignment"])
        compare(rewards.diversity, reward_vectors[f"{prefix}_diversity"])
        compare(rewards.reward, reward_vectors[f"{prefix}_coef{index}_reward"])
        advantage = functional.advantages(
            rewards.alignment, rewards.diversity, **weights
        )
        compare(advantage, reward_vectors[f"{prefix}_coef{index}_advantage"])
        compare(
            rewards.reward - advantage,
            reward_vectors[f"{prefix}_coef{index}_baseline"],
        )


def test_all_kinds_of_rollouts_are_among_the_cases(reward_vectors):
    kinds = {str(reward_vectors[f"{case}_kind"]) for case in CASES}
    assert kinds == {"random", "duplicates", "all_same", "rank_deficient"}


def test_the_tolerance_can_fail(reward_vectors):
    generated = reward_vectors["0_generated"]
    target = reward_vectors["0_target"]
    rewards = functional.feature_matching_rewards(1.0001 * generated, target)
    unwhitened = functional.feature_matching_rewards(
        1.0001 * generated, target, whitening=None
    )
    # Whitening undoes the scale, the plain diversity does not.
    compare(rewards.diversity, reward_vectors["0_whiten1_diversity"])
    with pytest.raises(AssertionError):
        compare(unwhitened.diversity, reward_vectors["0_whiten0_diversity"])


def feature_whitening_in_float64(rows, target):
    """The paper's appendix, written out with D x D matrices for one block."""
    second_moment = rows.T @ rows / len(rows)
    values, vectors = np.linalg.eigh(second_moment)
    kept = values > 1e-6 * values.max()
    root = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    return rows @ root, root @ target


@pytest.mark.parametrize("samples", [2, 4])
def test_feature_whitening_equals_the_appendix(samples):
    random = np.random.default_rng(samples)
    generated = random.normal(size=(2, samples, 3, 1, 6))
    generated[0, 1] = generated[0, 0]
    target = random.normal(size=(2, 3, 1, 6))
    rewards = FeatureMatchingReward(whitening="feature")(generated, target)
    for document, block in np.ndindex(2, 3):
        rows, truth = feature_whitening_in_float64(
            generated[document, :, block, 0], target[document, block, 0]
        )
        cosine = rows @ truth / np.linalg.norm(rows, axis=1) / np.linalg.norm(truth)
        gram = rows @ rows.T
        others = gram.sum(axis=1) - np.diag(gram)
        compare(rewards["alignment"][document, :, block], 2 * cosine)
        compare(rewards["diversity"][document, :, block], 2 / (samples - 1) * others)
        np.testing.assert_allclose(
            to_numpy(rewards["whitened_feature_matching_loss"][document, block]),
            np.sum((rows.mean(axis=0) - truth) ** 2),
            rtol=5e-5,
        )


def test_whitened_loss_equals_whitened_vectors(reward_vectors):
    generated = reward_vectors["0_generated"].astype("float64")
    target = reward_vectors["0_target"].astype("float64")
    rewards = FeatureMatchingReward()(generated, target)
    rows = generated[1, :, 2, 0]
    values, vectors = np.linalg.eigh(rows @ rows.T)
    root = (vectors / np.sqrt(values)) @ vectors.T
    truth = root @ np.repeat(target[1, 2], len(rows), axis=0)
    expected = np.sum((root @ rows - truth).mean(axis=0) ** 2)
    compare(rewards["whitened_feature_matching_loss"][1, 2], expected)
    plain = np.sum((rows.mean(axis=0) - target[1, 2, 0]) ** 2)
    compare(rewards["feature_matching_loss"][1, 2], plain)


def test_several_features_are_summed_before_the_cosine():
    generated = np.array([[3.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 1, 2, 2)
    target = np.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)
    rewards = functional.feature_matching_rewards(generated, target, whitening=None)
    # (3*1 + 1*1) / (sqrt(9 + 1) sqrt(2)), and one rollout has no diversity.
    compare(rewards.alignment, [[[2 * 4 / np.sqrt(20)]]])
    compare(rewards.diversity, [[[0.0]]])


def test_zero_features_give_finite_rewards():
    for whitening in ("rollout", "feature", None):
        rewards = functional.feature_matching_rewards(
            np.zeros((1, 3, 1, 1, 4)), np.zeros((1, 1, 1, 4)), whitening=whitening
        )
        compare(rewards.reward, np.zeros((1, 3, 1)))


def column(*values):
    return np.array(values, dtype="float32").reshape(1, -1, 1)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # rewards 1, 2, 6 - 0.5 * (0, 2, 4) = 1, 1, 4
        ("reinforce", [1.0, 1.0, 4.0]),
        ("group_norm", [-1 / np.sqrt(3), -1 / np.sqrt(3), 2 / np.sqrt(3)]),
        # alignment baselines 4, 3.5, 1.5; diversity baselines
        # 0.5 * ((6 - 0) / 1, (6 - 4) / 1, (6 - 8) / 1) = 3, 1, -1
        ("rloo", [1 - (4 - 3), 1 - (3.5 - 1), 4 - (1.5 + 1)]),
    ],
)
def test_advantages_by_hand(estimator, expected):
    advantage = functional.advantages(
        column(1, 2, 6),
        column(0, 2, 4),
        diversity_weight=0.5,
        estimator=estimator,
    )
    compare(advantage, column(*expected))


def test_leave_one_out_with_few_samples():
    two = functional.advantages(column(1, 3), column(5, 5), diversity_weight=2.0)
    compare(two, column(1 - 10 - 3, 3 - 10 - 1))
    one = functional.advantages(column(1.5), column(0))
    compare(one, column(1.5))


@pytest.mark.parametrize("whitening", ["rollout", "feature", None])
@pytest.mark.parametrize(
    ("estimator", "samples", "tolerance"),
    [("group_norm", 2, 0.0), ("group_norm", 4, 0.0), ("rloo", 4, 1e-5)],
)
def test_the_same_rollouts_have_no_advantage(whitening, estimator, samples, tolerance):
    """Their rewards differ by rounding, which is not to be divided by itself."""
    random = np.random.default_rng(samples)
    generated = random.normal(size=(1, 1, 5, 2, 16)).repeat(samples, axis=1)
    generated *= 1 + 1e-7 * random.normal(size=generated.shape)
    target = random.normal(size=(1, 5, 2, 16))
    judged = FeatureMatchingReward(whitening=whitening).judge(
        ops.convert_to_tensor(generated, "float32"),
        ops.convert_to_tensor(target, "float32"),
        None,
        estimator,
    )
    assert np.abs(to_numpy(judged["advantage"])).max() <= tolerance


def test_group_norm_does_not_ask_how_large_rewards_are():
    for scale in (1.0, 1e6):
        found = functional.advantages(
            scale * column(1.0, 1.001), column(0, 0), estimator="group_norm"
        )
        expected = column(-(0.5**0.5), 0.5**0.5)
        np.testing.assert_allclose(to_numpy(found), expected, rtol=5e-3)


def test_group_norm_of_equal_rewards_is_zero():
    advantage = functional.advantages(
        column(2, 2, 2), column(0, 0, 0), estimator="group_norm"
    )
    compare(advantage, column(0, 0, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda g, t: functional.feature_matching_rewards(g, t, whitening="zca"),
            r"whitening.*\['rollout', 'feature', None\].*'zca'",
        ),
        (
            lambda g, t: functional.feature_matching_rewards(g[0], t),
            r"\[B, n, K, F, D\].*\(2, 3, 1, 4\)",
        ),
        (
            lambda g, t: functional.feature_matching_rewards(g, t[:, :2]),
            r"\(1, 3, 1, 4\).*\(1, 2, 1, 4\)",
        ),
        (
            lambda g, t: functional.advantages(g, g, estimator="grpo"),
            r"estimator.*rloo.*'grpo'",
        ),
    ],
)
def test_wrong_calls_say_what_was_expected(call, message):
    generated, target = np.ones((1, 2, 3, 1, 4)), np.ones((1, 3, 1, 4))
    with pytest.raises(ValueError, match=message):
        call(generated, target)


def products_of(generated, target):
    """Of rollouts `[n, D]` and one target `[D]`."""
    found = feature_inner_products(
        np.array(generated, "float32")[None, :, None, None],
        np.array(target, "float32")[None, None, None],
    )
    return whiten(found, None)


def test_unbiased_feature_matching_loss_by_hand():
    """Rollouts (1, 0), (0, 1), (0, 1) for (1, 0): pairs 1/3, truth 2/3, 1."""
    products = products_of([[1, 0], [0, 1], [0, 1]], [1, 0])
    compare(functional.unbiased_feature_matching_loss(products), [[2 / 3]])
    # The mean (1/3, 2/3) is away by 8/9: (1 - 1/3) / 3 too far, from variance.
    compare(functional.feature_matching_loss(products), [[8 / 9]])


@pytest.mark.parametrize("samples", [2, 3])
def test_unbiased_feature_matching_loss_on_average(samples):
    """Every tuple of rollouts, weighted with its probability: the loss itself."""
    values = np.array([[1, 0], [0.6, 0.8], [0, -1]], "float32")
    chances, target = np.array([0.5, 0.3, 0.2]), np.array([0, 1], "float32")
    exact = np.sum((chances @ values - target) ** 2)
    biased = unbiased = 0.0
    for chosen in itertools.product(range(3), repeat=samples):
        products = products_of(values[list(chosen)], target)
        chance = np.prod(chances[list(chosen)])
        estimate = functional.unbiased_feature_matching_loss(products)
        unbiased += chance * to_numpy(estimate)[0, 0]
        biased += chance * to_numpy(functional.feature_matching_loss(products))[0, 0]
    assert unbiased == pytest.approx(exact, abs=TOLERANCE)
    variance = 1.0 - np.sum((chances @ values) ** 2)
    assert biased == pytest.approx(exact + variance / samples, abs=TOLERANCE)


def test_unbiased_feature_matching_loss_of_unit_features(reward_vectors):
    generated = reward_vectors["0_generated"]
    target = reward_vectors["0_target"]
    generated = generated / np.linalg.norm(generated, axis=-1, keepdims=True)
    target = target / np.linalg.norm(target, axis=-1, keepdims=True)
    generated, target = generated[:, :, :, :1], target[:, :, :1]
    reward = FeatureMatchingReward(whitening=None)
    reward.measures_unbiased = True
    found = reward(generated, target)
    expected = 1.0 - np.mean(to_numpy(found["alignment"]), axis=1)
    expected += np.mean(to_numpy(found["diversity"]), axis=1) / 2
    compare(found["unbiased_feature_matching_loss"], expected)


def test_unbiased_feature_matching_loss_refuses_one_rollout():
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        functional.unbiased_feature_matching_loss(products_of([[1, 0]], [1, 0]))
