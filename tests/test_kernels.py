"""Each faster implementation against its plain definition, forward and backward."""

import numpy as np
import pytest
from helpers import flat, gradients, to_numpy
from keras import Variable, ops

from keras_ebft import BlockGeometry
from keras_ebft.kernels import row_chunks, strided_attention
from keras_ebft.kernels.linear_logprob import chunked, linear_logprob
from keras_ebft.kernels.linear_logprob.reference import linear_logprob_reference
from keras_ebft.kernels.linear_sample import linear_sample
from keras_ebft.kernels.linear_sample.reference import (
    invert_cumulative,
    linear_sample_reference,
    running_sum,
    take,
)
from keras_ebft.kernels.strided_attention.reference import strided_attention_reference

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype("float32")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", 400)
    monkeypatch.setattr(row_chunks, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(chunked, "ROWS", 8)
    monkeypatch.setattr(chunked, "TOKENS", 16)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(10, 10, (1, 10)), (2**12, 1024, (2, 2**11)), (100, 2**20, (2, 50))],
)
def test_chunk_rows(rows, columns, expected):
    assert row_chunks.chunk_rows(rows, columns) == expected


def test_chunks_hold_rows_of_every_part_by_hand():
    chunks = row_chunks.RowChunks(10, parts=2, count=2)
    rows = ops.arange(10)
    cut = chunks.cut(rows)
    # The first part has rows 0 to 4, and each chunk three of a part's, padded.
    for index, expected in enumerate(([0, 1, 2, 5, 6, 7], [3, 4, 0, 8, 9, 0])):
        assert to_numpy(chunks.at(cut, index)).tolist() == expected
    assert to_numpy(chunks.joined(cut)).tolist() == list(range(10))
    doubled = chunks.zeros(dtype=rows.dtype)
    for index in range(2):
        doubled = chunks.put(doubled, index, 2 * chunks.at(cut, index))
    assert to_numpy(chunks.joined(doubled)).tolist() == list(range(0, 20, 2))
    left, right = normal(6, 2), normal(6, 3)
    products = to_numpy(chunks.products(*map(ops.convert_to_tensor, (left, right))))
    expected = [left[:3].T @ right[:3], left[3:].T @ right[3:]]
    np.testing.assert_allclose(products, expected, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 8, 37])
# Divided by tiles, divided by a few more of them, and by none (a prime).
@pytest.mark.parametrize("tokens", [16, 50, 53])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"temperature": 1.7, "soft_cap": 2.0}]
)
def test_linear_logprob_in_chunks(small_chunks, rows, tokens, options):
    hidden, head = Variable(normal(rows, 8)), Variable(normal(tokens, 8))
    labels = ops.convert_to_tensor(RANDOM.integers(0, tokens, rows).astype("int32"))
    log_prob_weight, entropy_weight = (
        ops.convert_to_tensor(normal(rows)) for _ in range(2)
    )

    def weighted(function):
        log_prob, entropy = function(hidden.value, head.value, labels, **options)
        return ops.sum(log_prob * log_prob_weight) + ops.sum(entropy * entropy_weight)

    for one, two in zip(
        linear_logprob(hidden.value, head.value, labels, **options),
        linear_logprob_reference(hidden.value, head.value, labels, **options),
    ):
        np.testing.assert_allclose(to_numpy(one), to_numpy(two), atol=5e-5)
    ours = gradients(lambda: weighted(linear_logprob), [hidden, head])
    theirs = gradients(lambda: weighted(linear_logprob_reference), [hidden, head])
    size = np.linalg.norm(flat(theirs))
    assert np.linalg.norm(flat(ours) - flat(theirs)) < 2e-5 * size
    assert size > 0.1


def test_gradients_have_the_dtypes_of_what_they_are_by(small_chunks):
    """Under a mixed policy hidden states are half precision, the head is not."""
    hidden, head = Variable(normal(5, 8), dtype="bfloat16"), Variable(normal(50, 8))
    labels = ops.convert_to_tensor(np.arange(5, dtype="int32"))

    def loss():
        return ops.sum(linear_logprob(hidden.value, head.value, labels)[0])

    def is_rounded(gradient):
        bits = np.asarray(gradient, "float32").view("uint32")
        return not (bits & 0xFFFF).any()

    by_hidden, by_head = gradients(loss, [hidden, head])
    assert is_rounded(by_hidden)
    assert not is_rounded(by_head)


def test_linear_logprob_against_float64():
    hidden, head = normal(3, 4), normal(5, 4)
    labels = np.array([0, 4, 2], dtype="int32")
    logits = 2.0 * np.tanh(hidden.astype("float64") @ head.T / 2.0) / 0.7
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    log_prob, entropy = linear_logprob(
        *(ops.convert_to_tensor(v) for v in (hidden, head, labels)),
        temperature=0.7,
        soft_cap=2.0,
    )
    np.testing.assert_allclose(to_numpy(log_prob), log_p[[0, 1, 2], labels], atol=1e-5)
    np.testing.assert_allclose(
        to_numpy(entropy), -(np.exp(log_p) * log_p).sum(axis=1), atol=1e-5
    )


@pytest.mark.parametrize("size", [3, 128, 300])
def test_invert_cumulative_finds_the_first_sum_above(size):
    weights = RANDOM.random((500, size)).astype("float32")
    weights[:, ::3] = 0.0
    uniform = RANDOM.random(500).astype("float32")
    # Away from the steps of the sum, float32 and float64 must agree.
    running = np.cumsum(weights.astype("float64"), axis=1)
    goal = uniform * running[:, -1]
    clear = np.abs(running - goal[:, None]).min(axis=1) > 1e-4
    index = to_numpy(
        invert_cumulative(
            ops.convert_to_tensor(weights), ops.convert_to_tensor(uniform)
        )
    )
    np.testing.assert_array_equal(
        index[clear], (running <= goal[:, None]).sum(axis=1)[clear]
    )
    assert clear.sum() > 400


@pytest.mark.parametrize("count", [1, 16, 17, 100, 128, 129])
def test_running_sums_are_those_of_numpy(count):
    """Of whole numbers, which are exact in any order."""
    rows = np.random.default_rng(0).integers(0, 100, (3, count)).astype("float32")
    found = ops.convert_to_numpy(running_sum(ops.convert_to_tensor(rows)))
    np.testing.assert_array_equal(found, np.cumsum(rows, axis=1))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_a_weight_of_zero_is_never_drawn(uniform):
    weights = np.zeros((1, 400), dtype="float32")
    weights[0, [130, 200]] = 0.1, 0.7
    index = invert_cumulative(
        ops.convert_to_tensor(weights), ops.convert_to_tensor(np.float32([uniform]))
    )
    assert to_numpy(index)[0] in (130, 200)


def test_rounding_of_running_sums_draws_no_weight_of_zero():
    """Goals where running sums of many groups, nine in ten empty, end."""
    random = np.random.default_rng(0)
    weights = np.zeros((64, 500 * 128), dtype="float32")
    weights[:, ::128] = random.random((64, 500)) * (random.random((64, 500)) < 0.1)
    ends = np.cumsum(weights[:, ::128], axis=1, dtype="float32")
    weights = ops.convert_to_tensor(weights)
    for place in range(20, 500, 40):
        uniform = ops.convert_to_tensor(ends[:, place] / ends[:, -1])
        index = ops.convert_to_numpy(invert_cumulative(weights, uniform))
        drawn = ops.convert_to_numpy(take(weights, ops.convert_to_tensor(index)))
        assert (drawn > 0).all()


def test_linear_sample_draws_from_the_distribution(small_chunks):
    hidden, head = normal(1, 4), normal(7, 4)
    draws = 4000
    logits = (hidden.astype("float64") @ head.T / 0.6)[0]
    expected = draws * np.exp(logits) / np.exp(logits).sum()
    tokens, log_prob = linear_sample(
        ops.convert_to_tensor(np.repeat(hidden, draws, axis=0)),
        ops.convert_to_tensor(head),
        ops.convert_to_tensor(RANDOM.random(draws).astype("float32")),
        temperature=0.6,
    )
    tokens, log_prob = to_numpy(tokens), to_numpy(log_prob)
    observed = np.bincount(tokens, minlength=7)
    # 6 degrees of freedom: 22.5 is exceeded once in a thousand seeds.
    assert np.sum((observed - expected) ** 2 / expected) < 22.5
    np.testing.assert_allclose(log_prob, np.log(expected / draws)[tokens], atol=1e-5)


def test_linear_sample_does_not_depend_on_chunks(small_chunks):
    arguments = [normal(37, 8), normal(50, 8), RANDOM.random(37).astype("float32")]
    arguments = [ops.convert_to_tensor(a) for a in arguments]
    for one, two in zip(
        linear_sample(*arguments, temperature=0.5, soft_cap=3.0),
        linear_sample_reference(*arguments, temperature=0.5, soft_cap=3.0),
    ):
        np.testing.assert_allclose(to_numpy(one), to_numpy(two), atol=5e-6)


def dense_attention(geometry, document, blocks, window, cap, scale):
    """Attention over the whole [T + K*G] sequence in float64, one sample.

    `document` and `blocks` are (query, key, value) `[T, H, d]`, `[K, G, H, d]`.
    """
    query, key, value = (
        np.concatenate([d, b.reshape(-1, *b.shape[2:])]).astype("float64")
        for d, b in zip(document, blocks)
    )
    groups = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    position = np.concatenate([np.arange(geometry.length), geometry.positions.ravel()])
    seen = geometry.attention_mask()
    if window is not None:
        seen &= position[:, None] - position[None, :] < window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output = np.einsum("hqk,khd->qhd", weights, value)
    return output[geometry.length :].reshape(blocks[0].shape)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (6, None), (9, 1.5)])
def test_strided_attention_equals_the_dense_mask(window, cap):
    geometry = BlockGeometry(60, context_length=3, rollout_length=4, stride=3)
    blocks, length = geometry.num_blocks, geometry.length
    assert blocks > 16, "several tiles"
    document = [normal(2, length, heads, 8) for heads in (4, 2, 2)]
    generated = [normal(2, 3, blocks, 4, heads, 8) for heads in (4, 2, 2)]
    query, key, value = (ops.convert_to_tensor(g) for g in generated)
    output = strided_attention(
        query,
        key,
        value,
        *(ops.convert_to_tensor(d) for d in document[1:]),
        geometry.anchors,
        scale=0.3,
        sliding_window=window,
        soft_cap=cap,
    )
    for b, n in np.ndindex(2, 3):
        expected = dense_attention(
            geometry,
            [d[b] for d in document],
            [g[b, n] for g in generated],
            window,
            cap,
            0.3,
        )
        np.testing.assert_allclose(to_numpy(output)[b, n], expected, atol=2e-6)


def test_one_query_at_a_time_equals_all_at_once():
    geometry = BlockGeometry(30, 4, 4, 4)
    blocks = geometry.num_blocks
    document = [ops.convert_to_tensor(normal(1, 30, 2, 8)) for _ in range(2)]
    query, key, value = (
        ops.convert_to_tensor(normal(1, 2, blocks, 4, 2, 8)) for _ in range(3)
    )
    options = {"scale": 0.4, "sliding_window": 7}
    whole = strided_attention_reference(
        query, key, value, *document, geometry.anchors, **options
    )
    for step in range(4):
        one = strided_attention(
            query[:, :, :, step : step + 1],
            key,
            value,
            *document,
            geometry.anchors,
            query_offset=step,
            **options,
        )
        np.testing.assert_allclose(
            to_numpy(one)[:, :, :, 0], to_numpy(whole)[:, :, :, step], atol=1e-6
        )
