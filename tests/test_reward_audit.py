"""The audit judges rollouts as the model does, and its controls come out."""

import json

import numpy as np
import pytest
from helpers import byte_causal_lm, documents, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.evaluation import RewardAudit
from keras_ebft.evaluation.audit.result import AuditResult

# The operations are those of other tests, dispatched one by one.
pytestmark = pytest.mark.on_torch

SAMPLER = keras_ebft.BlockSampler(
    rollout_length=4, stride=4, context_length=4, num_samples=3
)
# A small vocabulary, so that rollouts hold true tokens.
X = documents(5, 20, vocabulary=6)


def build(**options):
    options.setdefault("sampler", SAMPLER)
    return keras_ebft.EBFTModel(llama(num_layers=3), seed=0, **options)


PARTS = {
    "stack": {
        "feature_network": keras_ebft.FeatureNetwork(
            layers=(1, 3), mode="stack", pooling="mean"
        ),
        "reward": keras_ebft.FeatureMatchingReward(0.7, 0.3, whitening=None),
        "advantage": "group_norm",
    },
    "token": {
        "feature_network": keras_ebft.FeatureNetwork(mode="mean", pooling="token"),
        "reward": keras_ebft.FeatureMatchingReward(whitening="feature"),
    },
}


FEW = {
    "layers": [(0.25, 0.5, 0.75), (0.4, 0.75)],
    "poolings": ["last_token", "concat"],
    "resamples": 200,
}


@pytest.fixture(scope="module")
def audited():
    return RewardAudit(build(), **FEW)(X, batch_size=2)


def own_setting(result):
    (index,) = [i for i, row in enumerate(result.rows) if row["of_the_model"]]
    return result.rows[index], result.judged[index]


def check_same_rewards(model, x, result):
    row, judged = own_setting(result)
    expected = model.rewards(x, result.rollouts)
    for name, found in judged.items():
        wanted = to_numpy(expected[name])
        if wanted.ndim == 4:
            wanted = wanted.mean(axis=-1)
        np.testing.assert_allclose(found, wanted, atol=2e-4, err_msg=name)
    return row


def test_rewards_are_those_of_the_model(audited):
    model = build()
    row = check_same_rewards(model, X, audited)
    assert row["tapped"] == [1, 2]
    # Another setting's are not.
    wanted = to_numpy(model.rewards(X, audited.rollouts)["advantage"])
    others = [
        judged["advantage"]
        for other, judged in zip(audited.rows, audited.judged)
        if not other["of_the_model"]
    ]
    assert len(others) == 3
    assert all(np.abs(other - wanted).max() > 0.02 for other in others)


@pytest.mark.parametrize("kind", PARTS)
def test_rewards_are_those_of_the_model_whatever_its_setting(kind):
    model = build(**PARTS[kind])
    result = RewardAudit(model, layers=[(2,)], poolings=["mean"], resamples=9)(X, 5)
    check_same_rewards(model, X, result)


def table(token_ids, positions, attend):
    """A feature network of one's own: a table of vectors."""
    vectors = np.random.default_rng(0).normal(size=(31, 99)).astype("float32")
    return ops.take(ops.convert_to_tensor(vectors), token_ids, axis=0)


def test_networks_of_ones_own_have_no_layers():
    model = build(feature_network=keras_ebft.FeatureNetwork(network=table))
    result = RewardAudit(model, poolings=["concat"], resamples=9)(X, 5)
    row = check_same_rewards(model, X, result)
    assert [r["mode"] for r in result.rows] == ["callable"] * 3
    assert row["tapped"] == []
    assert "own*" in str(result)
    # One-hot in all but name: unwhitened, "concat" finds the truest rollouts.
    best = max(r["alignment"]["share"]["correlation"]["value"] for r in result.rows)
    assert best > 0.8


def test_rollouts_are_those_of_a_plain_language_model_too(audited):
    """What is sampled and read does not depend on who asks."""
    plain = RewardAudit(llama(num_layers=3), sampler=SAMPLER, **FEW)(X, batch_size=2)
    np.testing.assert_array_equal(
        plain.rollouts["token_ids"], audited.rollouts["token_ids"]
    )
    for one, other in zip(plain.judged, audited.judged):
        np.testing.assert_allclose(one["reward"], other["reward"], atol=1e-5)


def test_every_combination_is_there_once(audited):
    # Of three layers (.25, .5, .75) and (.4, .75) are both 1 and 2.
    settings = {
        (tuple(row["tapped"]), row["pooling"], row["whitening"]) for row in audited.rows
    }
    assert len(settings) == len(audited.rows) == 2 * 2
    values = [row["advantage"]["share"]["correlation"]["value"] for row in audited.rows]
    assert values == sorted(values, reverse=True)


def test_controls_come_out(audited):
    for row in audited.rows:
        controls = row["controls"]
        assert controls["blocks"] >= 15
        alignment = controls["alignment"]
        if row["whitening"] is None:
            assert controls["passed"]
            assert controls["truth_first"]["value"] == 1.0
            assert alignment["truth"] == pytest.approx(2.0, abs=1e-5)
            assert max(v for k, v in alignment.items() if k != "truth") < 1.99


def test_controls_fail_where_the_reward_is_wrong(audited):
    """A reward turned round is told."""
    assert "Controls came out" in str(audited) or "FAILED" in str(audited)
    rows = [{**row, "controls": dict(row["controls"])} for row in audited.rows]
    for row in rows:
        row["controls"]["passed"] = False
    failed = AuditResult(
        rows, "share", audited.judged, audited.qualities, audited.live, {}
    )
    assert f"CONTROLS FAILED (!) in {len(rows)} of {len(rows)} settings" in str(failed)
    assert "controls failed" in failed.advice
    # One that passed is taken before better ones that did not.
    rows[-1]["controls"]["passed"] = True
    assert failed.best is failed.rows[-1]


def turned_round(reward, advantage, rollouts, frozen):
    from keras_ebft.step import judged

    said = judged(reward, advantage, rollouts, frozen)
    return said._replace(alignment=-said.alignment)


def test_controls_are_judged_and_not_assumed(monkeypatch):
    monkeypatch.setattr("keras_ebft.evaluation.audit.reward_audit.judged", turned_round)
    audit = RewardAudit(
        build(), layers=[(2,)], poolings=["mean"], whitenings=[None], resamples=20
    )
    result = audit(X)
    unwhitened = [row for row in result.rows if row["whitening"] is None]
    assert len(unwhitened) == 1
    assert all(row["controls"]["passed"] is False for row in unwhitened)
    assert all(row["controls"]["truth_first"]["value"] == 0 for row in unwhitened)


def test_masks_count_as_in_training():
    """Padding, packed documents and answers: dead blocks are in no statistic."""
    lengths = np.array([20, 20, 13, 20, 20])
    padding = np.arange(20) < lengths[:, None]
    segments = np.where(np.arange(20) < 9, 1, 2) * padding
    answers = np.ones((5, 20), bool)
    answers[:, 12:14] = False
    answers[3, 4:] = False
    x = {
        "token_ids": X,
        "padding_mask": padding,
        "segment_ids": segments,
        "answer_mask": answers,
    }
    model = build()
    result = RewardAudit(model, layers=[(2,)], poolings=["mean"], resamples=20)(x, 5)
    row = check_same_rewards(model, x, result)
    # Blocks at 4 (of document 1), 8 (crosses), 12 and 16 (of document 2, which
    # begins at 9: only 16 shows four tokens of it).
    anchors = np.array([[4, -1, -1, 16]] * 5)
    anchors[2, 3] = -1
    anchors[3] = -1
    assert result.rollouts["anchors"].tolist() == anchors.tolist()
    assert row["blocks"] == (anchors >= 0).sum() == result.live.sum()
    # Documents, not rows, are drawn: two of each row, one of the padded, none of 3.
    assert row["documents"] == 7


def ends_with_a_vowel(prompts, completions, targets):
    return [
        [[float(text[-1:] in "aeiou") for text in sample] for sample in document]
        for document in completions
    ]


def test_scores_of_ones_own_come_first():
    texts = ["abcdefghijklmnopqrst", "the quick brown fox j", "abababababababababab"]
    audit = RewardAudit(
        byte_causal_lm(),
        layers=[(1,)],
        poolings=["mean"],
        sampler=keras_ebft.BlockSampler(
            rollout_length=3, stride=3, context_length=3, temperature=2.0
        ),
        scores={"vowel": ends_with_a_vowel},
        resamples=20,
    )
    result = audit(texts)
    assert result.headline == "vowel"
    assert "vowel" in str(result)
    assert result.qualities["vowel"].shape == result.qualities["share"].shape
    assert set(np.unique(result.qualities["vowel"])) <= {0.0, 1.0}
    ids = keras_ebft.VerifierReward(lambda p, c, t: np.ones((5, 3, 4)), decode=False)
    few = {"layers": [(2,)], "poolings": ["mean"], "whitenings": [None]}
    result = RewardAudit(build(), **few, scores={"one": ids}, resamples=5)(X, 5)
    assert result.rows[0]["equal_quality"]["one"]["value"] == 1.0
    assert "Nothing can be said" in result.advice


def test_an_audit_prints_and_is_json(audited):
    text = str(audited)
    assert text.splitlines()[-1] == audited.advice
    for row in audited.rows:
        assert f"{row['pooling']}" in text
    said = json.loads(json.dumps(audited.to_dict()))
    assert said["rows"][said["best"]] == json.loads(json.dumps(audited.best))
    assert RewardAudit(build(), **FEW)(X, batch_size=2).to_dict() == audited.to_dict()


def with_correlation(result, value, error):
    rows = json.loads(json.dumps(result.rows[:1]))
    rows[0]["controls"]["passed"] = True
    rows[0]["advantage"]["share"]["correlation"] = {
        "value": value,
        "low": value - 2 * error,
        "high": value + 2 * error,
        "error": error,
    }
    return AuditResult(rows, "share", result.judged[:1], {}, None, {})


def test_advice_follows_the_interval(audited):
    assert "EBFT can help here" in with_correlation(audited, 0.3, 0.1).advice
    assert "not likely to help" in with_correlation(audited, 0.3, 0.2).advice
    assert "make it worse" in with_correlation(audited, -0.3, 0.1).advice
    # The interval of the best of many is wider.
    many = with_correlation(audited, 0.3, 0.13)
    assert "EBFT can help here" in many.advice
    many.rows = many.rows * 20
    assert "not likely to help" in many.advice
    few = many.rows[0]
    few["equal_quality"]["share"]["value"] = 0.97
    few["equal_rewards"]["value"] = 0.95
    assert "97% of the blocks no rollout is better" in many.advice
    assert "95% of the blocks all rewards are equal" in many.advice
    # Intervals of a few blocks are no more to be trusted than those of few documents.
    few["documents"], few["informative"]["share"] = 10, 5
    assert "5 blocks that tell rollouts apart are few" in many.advice
    few["informative"]["share"] = 10
    assert "are few" not in many.advice


def test_picture(audited):
    from keras_ebft import plots

    figure = plots.reward_audit(audited)
    assert figure.axes[0].get_title() == "share of true tokens"
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(audited.rows)
    assert sum(label.endswith("*") for label in labels) == 1


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "Expected `poolings` to be a list", {"poolings": "mean"}),
        (ValueError, "`poolings` to be one of", {"poolings": ["max"]}),
        (ValueError, "at least one of `whitenings`", {"whitenings": []}),
        (ValueError, "`modes` to be one of", {"modes": ["all"]}),
        (TypeError, "each of `layers` to be a tuple", {"layers": (0.25, 0.5)}),
        (ValueError, "within the network's 3 layers", {"layers": [(4,)]}),
        (TypeError, "`scores` to be a dict", {"scores": len}),
        (ValueError, "other than", {"scores": {"share": len}}),
        (TypeError, "VerifierReward or a function", {"scores": {"x": 1}}),
        (TypeError, "`sampler` to be a BlockSampler", {"sampler": 3}),
        (ValueError, "`resamples` to be at least 1", {"resamples": 0}),
        (
            ValueError,
            "at least 2 rollouts per block",
            {"sampler": keras_ebft.BlockSampler(num_samples=1)},
        ),
    ],
)
def test_arguments_are_checked(error, message, options):
    with pytest.raises(error, match=message):
        RewardAudit(llama(num_layers=3), **options)


def test_documents_and_models_are_checked():
    model = build()
    audit = RewardAudit(model, layers=[(1,)])
    with pytest.raises(ValueError, match="at least two documents"):
        audit(X[:1])
    dead = {"token_ids": X, "padding_mask": np.arange(20) < np.full((5, 1), 3)}
    with pytest.raises(ValueError, match="at least one block"):
        audit(dead)
    with pytest.raises(TypeError, match="an EBFTModel or a keras_hub CausalLM"):
        RewardAudit(3)
    model._training_steps.assign(2)
    with pytest.raises(ValueError, match="trained for 2 steps"):
        RewardAudit(model)
