"""Where blocks stand: given, random, at answers; and rollouts that stop."""

import numpy as np
import pytest
from helpers import documents, family, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.layout.blocks import make_blocks
from keras_ebft.layout.documents import read_documents
from keras_ebft.samplers import before_stop
from keras_ebft.training.batches import as_batch

G = 3


@pytest.fixture(scope="module")
def causal_lm():
    return llama(num_layers=1)


def build(causal_lm, reward=None, **sampler):
    settings = {"rollout_length": G, "stride": 4, "context_length": 4, "num_samples": 2}
    return keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(**{**settings, **sampler}),
        keras_ebft.FeatureNetwork(layers=(1,)),
        reward,
        seed=0,
    )


def blocks_of(sampler, x, uniform=None, stops=False):
    batch = {k: ops.convert_to_tensor(v) for k, v in x.items()}
    uniform = None if uniform is None else ops.convert_to_tensor(uniform)
    found = sampler.blocks(read_documents(as_batch(batch)), uniform, stops)
    return {
        name: to_numpy(value)
        for name, value in found._asdict().items()
        if value is not None
    }


def test_given_anchors_replace_the_stride(causal_lm):
    model, x = build(causal_lm), documents(2, 18)
    stride = model.rollout(x, seed=0)
    rollouts = to_numpy(stride["token_ids"])
    np.testing.assert_array_equal(to_numpy(stride["anchors"]), [[4, 8, 12]] * 2)
    given = {"token_ids": x, "anchors": np.array([[12, -1, 4, 8]] * 2)}
    order = [2, 0, 0, 1]
    replayed = rollouts[:, :, order]
    for method in (model.rewards, model.score):
        one, two = method(x, rollouts), method(given, replayed)
        for name in set(one) - {"document_log_prob"}:
            value, expected = to_numpy(two[name]), to_numpy(one[name])[:, :, order]
            if method == model.rewards:
                expected[:, :, 1] = 0.0
            else:
                value, expected = value[:, :, [0, 2, 3]], expected[:, :, [0, 2, 3]]
            np.testing.assert_allclose(value, expected, atol=1e-5)


def test_a_dead_block_changes_no_loss(causal_lm):
    model, x = build(causal_lm), documents(1, 18)
    rollouts = documents(6, G).reshape(1, 2, 3, G)
    three = {"token_ids": x, "anchors": np.array([[4, 8, -1]])}
    two = {"token_ids": x, "anchors": np.array([[4, 8]])}
    one = model.loss_terms(three, rollouts)
    other = model.loss_terms(two, rollouts[:, :, :2])
    for name, value in one.items():
        expected = float(to_numpy(other[name]))
        assert float(to_numpy(value)) == pytest.approx(expected, abs=1e-6), name


def test_random_anchors_are_places_where_a_block_fits():
    sampler = keras_ebft.BlockSampler(
        rollout_length=G, context_length=2, anchors="random", num_anchors=6
    )
    mask = np.ones((2, 12), dtype=bool)
    mask[1, 7:] = False
    x = {"token_ids": documents(2, 12), "padding_mask": mask}
    seen = [set(), set()]
    for seed in range(40):
        uniform = np.random.default_rng(seed).random((2, 12)).astype("float32")
        found = blocks_of(sampler, x, uniform)
        for row, (anchors, live) in enumerate(zip(found["anchors"], found["live"])):
            chosen = anchors[live].tolist()
            assert chosen == sorted(set(chosen))
            seen[row].update(chosen)
            # All three places of the short row, always.
            assert len(chosen) == (6 if row == 0 else 3)
    assert seen[0] == set(range(2, 10))
    assert seen[1] == {2, 3, 4}


@pytest.mark.slow_compiled
def test_random_anchors_differ_from_step_to_step_and_follow_the_seed(causal_lm):
    model = build(causal_lm, anchors="random", num_anchors=3)
    x = documents(2, 20)
    one, again, other = (model.rollout(x, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(to_numpy(one["anchors"]), to_numpy(again["anchors"]))
    assert (to_numpy(one["anchors"]) != to_numpy(other["anchors"])).any()
    # The rollouts carry their anchors; without them they cannot be placed.
    assert model.rewards(x, one)["reward"].shape == (2, 2, 3)
    with pytest.raises(ValueError, match="what `rollout` returned"):
        model.rewards(x, one["token_ids"])
    model.compile("sgd")
    history = model.fit(x, epochs=2, verbose=0).history
    assert len(set(history["alignment"])) == 2


def test_answer_anchors_and_the_true_answer():
    sampler = keras_ebft.BlockSampler(
        rollout_length=4, anchors="answer_start", num_anchors=3, stop_token_ids=(9,)
    )
    x = {
        "token_ids": documents(1, 16),
        # Two documents; the first has two answers, the second one of two tokens.
        "segment_ids": np.repeat([[1, 2, 0]], [10, 5, 1], axis=1),
        "answer_mask": np.zeros((1, 16), dtype=bool),
    }
    x["answer_mask"][0, [2, 3, 6, 7, 8, 9, 13, 14]] = True
    found = blocks_of(sampler, x, stops=True)
    assert found["anchors"].tolist() == [[2, 6, 13]]
    assert found["starts"].tolist() == [[0, 0, 10]]
    assert found["live"].all()
    assert found["true_exists"].tolist() == [
        [[True, True, False, False], [True] * 4, [True, True, False, False]]
    ]
    np.testing.assert_array_equal(found["true_counted"], found["true_exists"])
    # A rollout may run on where the answer has ended.
    assert found["counted"].all()


def test_rows_without_an_answer_are_dead():
    sampler = keras_ebft.BlockSampler(
        rollout_length=4, anchors="answer_start", stop_token_ids=None
    )
    x = {"token_ids": documents(2, 8), "answer_mask": np.zeros((2, 8), dtype=bool)}
    x["answer_mask"][1, 5:] = True
    found = blocks_of(sampler, x)
    assert found["live"].tolist() == [[False], [True]]
    assert not found["counted"][0].any()


def test_answer_anchors_need_answers(causal_lm):
    model = build(causal_lm, anchors="answer_start", stop_token_ids=None)
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"'answer_mask'.*answer_start"):
        model.fit(documents(2, 16))
    with pytest.raises(ValueError, match="num_anchors=20"):
        build(causal_lm, anchors="random", num_anchors=20).rollout(documents(1, 16))


@pytest.mark.slow_compiled
def test_learned_positions_bound_rows_and_rollouts_together():
    causal_lm = family("GPT2")  # 40 positions
    x = {"token_ids": documents(1, 36), "answer_mask": np.ones((1, 36))}
    model = build(
        causal_lm, anchors="answer_start", rollout_length=5, stop_token_ids=(9,)
    )
    with pytest.raises(ValueError, match=r"at most 40.*36 \+ 5"):
        model.rollout(x)
    # Blocks with no place are dead, and stay within the positions.
    model = build(causal_lm, rollout_length=5, stop_token_ids=None)
    given = {"token_ids": documents(1, 40), "anchors": np.array([[20, 39]])}
    rollouts = model.rollout(given, seed=0)
    assert to_numpy(rollouts["anchors"]).tolist() == [[20, -1]]
    losses = model.loss_terms(given, rollouts["token_ids"])
    assert np.isfinite(float(to_numpy(losses["loss"])))


def test_windows_of_a_stride_must_be_whole_unless_rollouts_stop():
    mask = np.ones((1, 12), dtype=bool)
    mask[0, 9:] = False
    documents_ = read_documents(
        as_batch({"token_ids": documents(1, 12), "padding_mask": mask})
    )
    anchors = np.array([4, 8, 10], dtype="int32")
    for short, live in ((False, [True, False, False]), (True, [True, True, False])):
        found = make_blocks(documents_, anchors, G, short_windows=short)
        assert to_numpy(found.live).tolist() == [live]
    assert to_numpy(found.counted)[0, 1].tolist() == [True, True, True]
    assert to_numpy(found.true_counted)[0, 1].tolist() == [True, False, False]


def test_tokens_up_to_the_first_stop_count():
    tokens = ops.convert_to_tensor([[1, 9, 2, 9], [8, 1, 1, 1], [1, 1, 1, 1]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    found = to_numpy(before_stop(tokens, (9, 8))).astype(int)
    assert found.tolist() == expected
    assert to_numpy(before_stop(tokens, ())).all()


@pytest.mark.slow_compiled
def test_what_follows_a_stop_token_changes_nothing(causal_lm):
    """Prompt to completion: rewards, losses and pooled features of one rollout."""
    model = build(
        causal_lm, anchors="answer_start", rollout_length=6, stop_token_ids=(30,)
    )
    x = {"token_ids": documents(1, 14), "answer_mask": np.zeros((1, 14), dtype=bool)}
    x["answer_mask"][0, 7:11] = True
    rollouts = documents(2, 6, vocabulary=30, seed=3).reshape(1, 2, 1, 6)
    rollouts[0, 0, 0, 2] = 30
    changed = rollouts.copy()
    changed[0, 0, 0, 3:] = (changed[0, 0, 0, 3:] + 1) % 30
    for name in ("policy_loss", "entropy"):
        one, two = (to_numpy(model.loss_terms(x, r)[name]) for r in (rollouts, changed))
        assert one == two
    for one, two in zip(model.features(x, rollouts), model.features(x, changed)):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(two))
    # Pooled at each one's own last token: a shorter window, ending there, agrees.
    short = build(
        causal_lm, anchors="answer_start", rollout_length=3, stop_token_ids=(30,)
    )
    generated, _ = short.features(x, rollouts[..., :3])
    whole, target = model.features(x, rollouts)
    np.testing.assert_allclose(
        to_numpy(whole)[:, 0], to_numpy(generated)[:, 0], atol=1e-6
    )
    exact = build(
        causal_lm, anchors="answer_start", rollout_length=4, stop_token_ids=(30,)
    )
    _, four = exact.features(x, rollouts[..., :4])
    np.testing.assert_allclose(to_numpy(target), to_numpy(four), atol=1e-6)


def test_sampled_rollouts_end_with_the_stop_token(causal_lm):
    model = build(causal_lm, rollout_length=6, stop_token_ids=tuple(range(15)))
    rollouts = model.rollout(documents(2, 18), seed=0)
    tokens, mask = to_numpy(rollouts["token_ids"]), to_numpy(rollouts["mask"])
    stops = tokens < 15
    assert stops.any()
    first = np.where(stops.any(-1), stops.argmax(-1), 5)
    live = to_numpy(rollouts["anchors"])[:, None] >= 0
    np.testing.assert_array_equal(mask.sum(-1), np.where(live, first + 1, 0))
    # All that follows is the stop token, so that texts decode cleanly.
    np.testing.assert_array_equal(tokens[~mask & live[..., None]], 0)
