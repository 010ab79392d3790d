"""Whatever looks at a rollout counts the same of it: fit, evaluate, inspection."""

import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy

import keras_ebft

LENGTH = 16
# Two answers of two tokens, the second one near the end of its row: a rollout runs
# on where the answer ends, and where the row does.
ANSWERS = np.zeros((2, LENGTH), dtype=bool)
ANSWERS[0, [5, 6]] = ANSWERS[1, [14, 15]] = True
ROWS = {"token_ids": documents(2, LENGTH), "answer_mask": ANSWERS}
PLACES = {
    "stride": {},
    "answer_start": {"anchors": "answer_start", "stop_token_ids": None},
    "given": {},
}
MEASURED = ("entropy", "policy_loss", "ce_loss")


@pytest.fixture(scope="module")
def causal_lm():
    return llama(num_layers=1)


def build(causal_lm, **options):
    sampler = {"stride": 4, "context_length": 4, **options.pop("sampler")}
    # The likeliest token: whoever samples, samples the same.
    sampler = {"rollout_length": 4, "num_samples": 2, "temperature": 0.0, **sampler}
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(**sampler),
        keras_ebft.FeatureNetwork(layers=(1,)),
        advantage="reinforce",
        seed=0,
        **options,
    )
    model.compile(keras.optimizers.SGD(0.0))
    return model


def rows_for(place):
    if place == "given":
        return {**ROWS, "anchors": np.array([[3, 5, -1], [7, -1, 14]])}
    return ROWS


# Blocks at answers are those that were wrong once.
EVERY_PLACE = pytest.mark.parametrize(
    "place",
    [
        place
        if place == "answer_start"
        else pytest.param(place, marks=pytest.mark.slow_compiled)
        for place in PLACES
    ],
)


@EVERY_PLACE
def test_rollouts_looked_at_again_count_as_they_did_in_the_step(causal_lm, place):
    model, x = build(causal_lm, sampler=PLACES[place]), rows_for(place)
    evaluated = model.evaluate(x, batch_size=2, return_dict=True, verbose=0)
    rollouts = model.rollout(x, seed=0)
    for given in (rollouts, rollouts["token_ids"]):
        terms = model.loss_terms(x, given)
        for name in MEASURED:
            assert float(to_numpy(terms[name])) == pytest.approx(
                evaluated[name], rel=1e-5
            ), name
        rewards = to_numpy(model.rewards(x, given)["reward"])
        live = to_numpy(rollouts["anchors"]) >= 0
        assert rewards.mean(axis=1)[live].mean() == pytest.approx(
            evaluated["reward"], rel=1e-5
        )


@EVERY_PLACE
def test_every_update_learns_from_the_blocks_that_were_sampled(causal_lm, place):
    x = rows_for(place)
    once, twice = (
        build(causal_lm, sampler=PLACES[place], updates_per_rollout=updates)
        .fit(x, batch_size=2, verbose=0)
        .history
        for updates in (1, 2)
    )
    for name in (*MEASURED, "reward", "alignment"):
        assert twice[name][0] == pytest.approx(once[name][0], rel=1e-5), name


def test_tokens_of_the_answer_alone_count_at_answers(causal_lm):
    model = build(causal_lm, sampler=PLACES["answer_start"])
    rollouts = model.rollout(ROWS, seed=0)
    assert to_numpy(rollouts["anchors"]).tolist() == [[5], [14]]
    assert to_numpy(rollouts["mask"])[:, 0, 0].all()
