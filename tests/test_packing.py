"""Documents packed in one row count as they would in rows of their own."""

import numpy as np
import pytest
from helpers import documents, flat, llama, to_numpy, value_and_gradients
from keras import ops

import keras_ebft
from keras_ebft.layout.blocks import make_blocks
from keras_ebft.layout.documents import Documents, first_of_segment, take_tokens

SAMPLER = {"rollout_length": 3, "stride": 4, "context_length": 4, "num_samples": 2}
# One document of 12 tokens and one of 15; blocks at 4 and 8, and at 4, 8 and 12.
FIRST, SECOND = documents(1, 12), documents(1, 15, seed=1)


@pytest.fixture(scope="module")
def model():
    return keras_ebft.EBFTModel(
        llama(num_layers=1),
        keras_ebft.BlockSampler(**SAMPLER),
        keras_ebft.FeatureNetwork(layers=(1,)),
        ce_weight=0.3,
        seed=0,
    )


def apart(answers):
    token_ids = np.zeros((2, 15), dtype="int32")
    token_ids[0, :12], token_ids[1] = FIRST, SECOND
    mask = np.ones((2, 15), dtype=bool)
    mask[0, 12:] = False
    x = {"token_ids": token_ids, "padding_mask": mask}
    return {**x, "answer_mask": answers} if answers is not None else x


def packed(answers):
    token_ids = np.concatenate([FIRST, SECOND, np.zeros((1, 1))], axis=1)
    segments = np.repeat([[5, 3, 0]], [12, 15, 1], axis=1)
    x = {"token_ids": token_ids.astype("int32"), "segment_ids": segments}
    if answers is None:
        return x
    joined = np.concatenate([answers[0, :12], answers[1], [False]])
    return {**x, "answer_mask": joined[None]}


@pytest.mark.parametrize("with_answers", [False, True])
def test_packed_equals_apart(model, with_answers):
    answers = None
    if with_answers:
        answers = np.zeros((2, 15), dtype=bool)
        # The second block of the first document holds no answer: it is dead.
        answers[0, 5] = answers[0, 7] = True
        answers[1, 6:14] = True
    two_rows, one_row = apart(answers), packed(answers)
    rollouts = to_numpy(model.rollout(two_rows, seed=3)["token_ids"])
    assert rollouts.shape == (2, 2, 3, 3)
    together = documents(2 * 6, 3, seed=4).reshape(1, 2, 6, 3)
    # Row places: 4 and 8 in the first document, 16, 20 and 24 in the second; the
    # block at 12 begins with its document and sees nothing of it.
    places = [(0, 0, 0), (0, 1, 1), (1, 0, 3), (1, 1, 4), (1, 2, 5)]
    for document, block, place in places:
        together[0, :, place] = rollouts[document, :, block]

    alone, joined = model.rewards(two_rows, rollouts), model.rewards(one_row, together)
    live = 0
    for name in joined:
        values, expected = to_numpy(joined[name]), to_numpy(alone[name])
        assert not values[0, :, 2].any(), "the block that sees nothing is dead"
        for document, block, place in places:
            one, other = values[0, :, place], expected[document, :, block]
            np.testing.assert_allclose(one, other, atol=2e-5)
            live += bool(one.any())
    assert live >= (12 if with_answers else 15)

    (one, first), (other, second) = (
        value_and_gradients(
            lambda x=x, r=r: model.loss_terms(x, r)["loss"], model.trainable_variables
        )
        for x, r in ((two_rows, rollouts), (one_row, together))
    )
    assert one == pytest.approx(other, rel=2e-6)
    difference = flat(first) - flat(second)
    assert np.linalg.norm(difference) < 2e-5 * np.linalg.norm(flat(first))


def test_other_documents_of_a_row_change_nothing(model):
    x = packed(None)
    rollouts = documents(2 * 6, 3, seed=4).reshape(1, 2, 6, 3)
    changed = {**x, "token_ids": x["token_ids"].copy()}
    changed["token_ids"][:, :12] = (changed["token_ids"][:, :12] + 1) % 31
    one, two = (
        to_numpy(model.score(rows, rollouts)["log_prob"]) for rows in (x, changed)
    )
    np.testing.assert_array_equal(one[:, :, 3:], two[:, :, 3:])
    assert (one[:, :, :2] != two[:, :, :2]).all()


def test_next_tokens_across_a_boundary_do_not_count():
    row = Documents(
        ops.zeros((1, 5), "int32"),
        ops.convert_to_tensor([[True, True, True, True, False]]),
        first_of_segment(ops.convert_to_tensor([[1, 1, 2, 2, 0]])),
        ops.convert_to_tensor([[True, False, True, True, False]]),
    )
    assert to_numpy(row.next_token_mask).tolist() == [[False, False, True, False]]
    whole = row._replace(answer_mask=None)
    assert to_numpy(whole.next_token_mask).tolist() == [[True, False, True, False]]
    assert to_numpy(row.positions).tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_first_of_segment(length):
    segments = np.sort(np.random.default_rng(length).integers(0, 5, (3, length)))
    expected = [[list(row).index(value) for value in row] for row in segments]
    found = first_of_segment(ops.convert_to_tensor(segments))
    np.testing.assert_array_equal(to_numpy(found), expected)


def test_take_tokens():
    values = np.arange(24.0).reshape(2, 4, 3)
    index = np.array([[[3, 0]], [[1, 1]]])
    found = take_tokens(ops.convert_to_tensor(values), ops.convert_to_tensor(index))
    expected = [[values[0, [3, 0]]], [values[1, [1, 1]]]]
    np.testing.assert_array_equal(to_numpy(found), expected)
    found = take_tokens(ops.convert_to_tensor(values), index[0])
    np.testing.assert_array_equal(to_numpy(found), values[:, [[3, 0]]])


def test_a_block_must_see_enough_of_its_own_document():
    """At 12 a block sees two tokens of a document that begins at 10."""
    segments = ops.convert_to_tensor(np.repeat([[1, 2]], [10, 14], axis=1))
    rows = Documents(
        ops.zeros((1, 24), "int32"),
        ops.ones((1, 24), "bool"),
        first_of_segment(segments),
    )
    anchors = np.array([4, 8, 12, 16, 20], dtype="int32")
    for least, live in ((2, [1, 0, 1, 1, 1]), (3, [1, 0, 0, 1, 1])):
        found = make_blocks(rows, anchors, 3, context_length=least)
        assert to_numpy(found.live).astype(int).tolist() == [live]
