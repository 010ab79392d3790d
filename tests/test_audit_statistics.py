"""The audit's statistics on numbers that can be done on paper."""

import numpy as np
import pytest

from keras_ebft.evaluation.audit.controls import CONTROLS, control_rollouts
from keras_ebft.evaluation.audit.qualities import compare_with_truth
from keras_ebft.evaluation.audit.statistics import (
    ClusterBootstrap,
    as_correlation,
    as_mean,
    auc_parts,
    correlation_parts,
    gain_parts,
    mean_parts,
    varies,
)

pytestmark = pytest.mark.backend_independent


def total(parts, combine):
    return float(combine(parts.sum(axis=0)))


def correlation(signal, quality):
    return total(correlation_parts(np.array(signal), np.array(quality)), as_correlation)


def test_correlation_is_pooled_within_blocks():
    # Block 1: x = -1, 0, 1 and y = -1, 1, 0 around their means: xy 1, xx 2, yy 2.
    # Block 2: x = -2, 0, 2 and y = -1, 0, 1: xy 4, xx 8, yy 2. Levels do not matter.
    signal = [[0.0, 1.0, 2.0], [100.0, 102.0, 104.0]]
    quality = [[0.0, 2.0, 1.0], [7.0, 8.0, 9.0]]
    assert correlation(signal, quality) == pytest.approx(5 / np.sqrt(10 * 4))
    # Over all rollouts at once it would be nearly 1.
    assert np.corrcoef(np.ravel(signal), np.ravel(quality))[0, 1] > 0.97


def test_blocks_where_either_side_is_constant_are_left_out():
    signal, quality = [[0.0, 1.0, 2.0]], [[0.0, 2.0, 1.0]]
    alone = correlation(signal, quality)
    constant = [[0.0, 0.0, 0.0]]
    for more in (constant, [[0.0, 5e-7, 0.0]]):
        assert correlation(signal * 2, quality + more) == pytest.approx(alone)
        assert correlation(signal + more, quality * 2) == pytest.approx(alone)
    assert np.isnan(correlation(constant, quality))
    # What differs by more is not left out.
    assert correlation(signal * 2, [*quality, [0.0, 1.0, 0.0]]) != pytest.approx(alone)


def test_auc_counts_pairs_of_one_block_and_ties_half():
    # Qualities 0, 1, 2: three pairs. The signal has one right, one tied, one wrong.
    signal, quality = np.array([[1.0, 1.0, 0.5]]), np.array([[0.0, 1.0, 2.0]])
    assert total(auc_parts(signal, quality), as_mean) == pytest.approx(0.5 / 3)
    assert total(auc_parts(-signal, quality), as_mean) == pytest.approx(2.5 / 3)
    # Equal qualities make no pair; two blocks are never compared.
    signal, quality = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [5, 6]])
    np.testing.assert_allclose(auc_parts(signal, quality), [[0, 0], [1, 1]])


def test_gain_is_of_what_the_signal_likes_best_and_the_oracle_gains_most():
    signal = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    quality = np.array([[0.0, 1.0, 5.0], [2.0, 4.0, 0.0]])
    # Block 1: 0 - 2. Block 2: two are liked best, (2 + 4) / 2 - 2.
    np.testing.assert_allclose(gain_parts(signal, quality), [[-2, 1], [1, 1]])
    assert total(gain_parts(quality, quality), as_mean) == pytest.approx(2.5)


def test_varies():
    assert varies(np.array([[1.0, 1.0], [1.0, 1.1], [1.0, 1.0 + 5e-7]])).tolist() == [
        False,
        True,
        False,
    ]


def test_intervals_draw_documents_not_blocks():
    # 40 documents of 5 equal blocks each: the mean's deviation is that of documents.
    random = np.random.default_rng(0)
    of_documents = random.normal(size=40)
    values, clusters = np.repeat(of_documents, 5), np.repeat(np.arange(40), 5)
    found = ClusterBootstrap(clusters, 2000, seed=1)(mean_parts(values), as_mean)
    error = of_documents.std() / np.sqrt(40)
    assert found.value == pytest.approx(of_documents.mean())
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.25 * error)
    # Block by block it would be too sure by a factor of sqrt(5).
    blocks = ClusterBootstrap(np.arange(200), 2000, seed=1)
    wrong = blocks(mean_parts(values), as_mean)
    assert wrong.error == pytest.approx(error / np.sqrt(5), rel=0.05)


def test_intervals_are_seeded_and_cover():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = random.normal(size=30)
        found = ClusterBootstrap(np.arange(30), 300, trial)(mean_parts(values), as_mean)
        covered += found.low <= 0.0 <= found.high
    # 95 % less what percentiles of 30 documents lose; 80 or 99 % would not pass.
    assert 0.89 < covered / 200 < 0.985
    again = [ClusterBootstrap(np.arange(30), 300, seed=s) for s in (5, 5, 6)]
    first, same, other = [b(mean_parts(values), as_mean) for b in again]
    assert first == same != other


def test_one_document_has_no_interval_and_nothing_no_value():
    found = ClusterBootstrap(np.zeros(4), 100)(mean_parts([1.0, 2, 3, 4]), as_mean)
    assert found.value == 2.5
    assert np.isnan(found.low)
    found = ClusterBootstrap(np.arange(3), 100)(np.zeros((3, 2)), as_mean)
    assert found.to_dict() == {"value": None, "low": None, "high": None, "error": None}


def test_qualities():
    truth = np.array([[[5, 6, 7, 8]]])
    rollouts = np.array([[5, 6, 9, 8], [9, 6, 7, 8], [5, 6, 7, -1]])[None, :, None]
    everything = np.ones((1, 1, 4), bool)
    found = compare_with_truth(rollouts, truth, everything)
    assert found["share"].ravel().tolist() == [0.75, 0.75, 0.75]
    assert found["prefix"].ravel().tolist() == [2, 0, 3]
    assert found["last"].ravel().tolist() == [1, 1, 0]
    # Only the middle two count: what stands elsewhere is not looked at.
    found = compare_with_truth(
        rollouts, truth, np.array([[[False, True, True, False]]])
    )
    assert found["share"].ravel().tolist() == [0.5, 1, 1]
    assert found["prefix"].ravel().tolist() == [1, 2, 2]
    assert found["last"].ravel().tolist() == [0, 1, 1]
    # A block of which nothing counts.
    found = compare_with_truth(rollouts, truth, ~everything)
    assert not any(values.any() for values in found.values())


def test_controls_are_what_they_are_called():
    random = np.random.default_rng(0)
    truth = random.integers(0, 9, (3, 4, 5))
    truth[0, 0] = 3  # cannot be shuffled into something else
    counted = np.ones(truth.shape, bool)
    counted[1, :, 0] = False
    usable = np.ones((3, 4), bool)
    usable[2, 3] = False
    found, told_apart = control_rollouts(truth, counted, usable, np.arange(9), seed=1)
    assert found.shape == (3, len(CONTROLS), 4, 5)
    changed, shuffled, other = (found[:, i] for i in (1, 2, 3))
    np.testing.assert_array_equal(found[:, 0], truth)
    assert not told_apart[0, 0]
    assert not told_apart[2, 3]
    assert told_apart.sum() == 10
    for row, block in np.argwhere(told_apart):
        here = row, block
        differs = changed[here] != truth[here]
        assert differs.sum() == 1
        assert counted[here][differs].all()
        assert sorted(shuffled[here]) == sorted(truth[here])
        assert (shuffled[here] == truth[here])[~counted[here]].all()
        elsewhere = [truth[r, k] for r, k in np.argwhere(usable) if r != row]
        assert any(np.array_equal(other[here], tokens) for tokens in elsewhere)
