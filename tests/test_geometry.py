import numpy as np
import pytest

from keras_ebft import BlockGeometry


@pytest.mark.parametrize("case", range(5))
def test_layout_equals_the_authors_code(layout_vectors, case):
    length, context, steps, stride, blocks = layout_vectors[f"{case}_config"]
    geometry = BlockGeometry(length, context, steps, stride)
    assert geometry.num_blocks == blocks
    # The vectors are step-major: token t of block k is at T + t*K + k.
    block_major = np.arange(steps)[None, :] * blocks + np.arange(blocks)[:, None]
    order = np.concatenate([np.arange(length), length + block_major.ravel()])
    mask = layout_vectors[f"{case}_mask"][np.ix_(order, order)]
    np.testing.assert_array_equal(geometry.attention_mask(), mask)
    positions = layout_vectors[f"{case}_positions"][order]
    np.testing.assert_array_equal(positions[:length], np.arange(length))
    np.testing.assert_array_equal(geometry.positions.ravel(), positions[length:])


@pytest.mark.parametrize(
    ("length", "anchors"),
    [(7, [3]), (8, [3]), (9, [3]), (10, [3, 6]), (12, [3, 6]), (13, [3, 6, 9])],
)
def test_any_length_from_one_block_on(length, anchors):
    geometry = BlockGeometry(length, context_length=3, rollout_length=4, stride=3)
    assert geometry.anchors.tolist() == anchors
    assert geometry.positions.shape == (len(anchors), 4)
    assert geometry.positions.max() < length


def test_too_short_names_the_lengths():
    with pytest.raises(ValueError, match=r"3 \+ 4 = 7 tokens.*length=6"):
        BlockGeometry(6, context_length=3, rollout_length=4)


def test_repr_rebuilds():
    geometry = BlockGeometry(20, 3, 4, 5)
    same = eval(repr(geometry), {"BlockGeometry": BlockGeometry})
    np.testing.assert_array_equal(same.positions, geometry.positions)
