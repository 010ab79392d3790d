"""What every implementation of a hot path must do: one class per path.

A test module subclasses a contract and names the implementation:

    class TestChunked(LinearLogprobContract):
        name = "chunked"
"""

import functools

import keras
import numpy as np
import pytest
from helpers import gradients, to_numpy
from keras import ops

from keras_ebft import kernels
from keras_ebft.kernels import contracts
from keras_ebft.kernels.causal_attention import specs as causal_specs
from keras_ebft.kernels.contracts import (
    BFLOAT16_TOLERANCE,
    EDGE_TOLERANCE,
    FLOAT32_TOLERANCE,
    LOG_PROB_TOLERANCE,
    sample_errors,
)
from keras_ebft.kernels.feature_reward import specs as reward_specs
from keras_ebft.kernels.linear_logprob import specs as logprob_specs
from keras_ebft.kernels.linear_sample import specs as sample_specs
from keras_ebft.kernels.projection import specs as projection_specs
from keras_ebft.kernels.strided_attention import specs as strided_specs

FINITE_DIFFERENCE_TOLERANCE = 1e-4


def implementation(op, name):
    """The record of an implementation."""
    return next(i for i in kernels.implementations(op) if i.name == name)


def tensor(array, dtype=None):
    return ops.convert_to_tensor(array, dtype=dtype)


def outputs_and_gradients(function, arrays, dtype="float32"):
    """Outputs of a function of arrays of this dtype, and gradients of their sum."""
    return contracts.outputs_and_gradients(function, [tensor(a, dtype) for a in arrays])


def error(found, expected):
    """Distance over the expected norm."""
    assert found.shape == expected.shape
    return contracts.error(found, expected)


@functools.cache
def expected(contract, spec, dtype="float32", rounded=False):
    """What the plain definition gives, from inputs rounded to bfloat16 or not."""
    arrays = spec.arrays()
    if rounded:
        arrays = {
            name: to_numpy(ops.cast(tensor(array, "bfloat16"), "float32"))
            for name, array in arrays.items()
        }
    reference = implementation(contract.op, "reference").load()
    return contract().measured(spec, reference, dtype, arrays)


class Contract:
    """What holds for every path with gradients.

    A path's contract has `op`, `specs` and `float64(spec, arrays)`; a subclass of
    it has `name`, and `run` if it needs something around the call.
    """

    op = name = specs = None

    def run(self, *tensors, **options):
        """Calls the implementation."""
        return implementation(self.op, self.name).load()(*tensors, **options)

    def supported(self, spec):
        """Skips what the record says is not supported."""
        options = implementation(self.op, self.name).options
        if options is not None and not spec.in_use() <= set(options):
            pytest.skip(f"{self.name} does not claim to support {spec.name}")

    def measured(self, spec, run=None, dtype="float32", arrays=None):
        arrays = spec.arrays() if arrays is None else arrays
        function = spec.bind(run or self.run)
        return outputs_and_gradients(function, list(arrays.values()), dtype)

    def check(self, spec, run=None):
        """Outputs and gradients are the definition's."""
        found = self.measured(spec, run)
        for found_part, expected_part in zip(found, expected(type(self), spec)):
            for one, two in zip(found_part, expected_part):
                assert np.isfinite(one).all()
                assert error(one, two) < FLOAT32_TOLERANCE

    def test_equals_the_definition(self, spec):
        self.supported(spec)
        self.check(spec)

    def test_equals_the_definition_in_bfloat16(self, bfloat16_spec):
        spec = bfloat16_spec
        self.supported(spec)
        dtypes = implementation(self.op, self.name).dtypes
        if dtypes is not None and "bfloat16" not in dtypes:
            pytest.skip(f"{self.name} does not claim to support bfloat16")
        exact = expected(type(self), spec, rounded=True)
        plain = expected(type(self), spec, "bfloat16")
        found = self.measured(spec, dtype="bfloat16")
        for found_part, plain_part, exact_part in zip(found, plain, exact):
            for one, two, three in zip(found_part, plain_part, exact_part):
                allowed = 1.5 * error(two, three) + BFLOAT16_TOLERANCE
                assert error(one, three) < allowed

    def test_equals_float64_and_its_finite_differences(self):
        spec = self.specs.TINY
        self.supported(spec)
        arrays = {k: v.astype("float64") for k, v in spec.arrays().items()}
        outputs, found = self.measured(spec)
        exact = self.float64(spec, **arrays)
        for one, two in zip(outputs, exact):
            assert error(one, two) < FLOAT32_TOLERANCE
        random = np.random.default_rng(3)
        weights = [random.normal(size=output.shape) for output in exact]

        def weighted(changed):
            outputs = self.float64(spec, **changed)
            return sum(np.sum(w * o) for w, o in zip(weights, outputs))

        for name, gradient in zip(arrays, found):
            numeric = np.zeros(gradient.shape)
            for index in np.ndindex(gradient.shape):
                change = np.zeros(gradient.shape)
                change[index] = 1e-4
                up = weighted({**arrays, name: arrays[name] + change})
                down = weighted({**arrays, name: arrays[name] - change})
                numeric[index] = (up - down) / 2e-4
            assert error(gradient, numeric) < FINITE_DIFFERENCE_TOLERANCE, name

    def test_a_planted_wrong_gradient_is_noticed(self):
        spec = self.specs.SPECS[0]
        self.supported(spec)
        for place in range(len(spec.arrays())):

            def wrong(*tensors, _place=place, **options):
                tensors = list(tensors)
                planted = tensors[_place]
                # Its own value, and a gradient that is one thousandth too large.
                still = ops.stop_gradient(planted)
                tensors[_place] = planted + 1e-3 * (planted - still)
                return self.run(*tensors, **options)

            with pytest.raises(AssertionError):
                self.check(spec, wrong)


def attention_float64(query, key, value, seen, scale, soft_cap):
    """Attention of queries `[Q, d]` to keys `[P, d]` where `seen` `[Q, P]`."""
    scores = query @ key.T * scale
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


def parameters(specs, bfloat16):
    """Decorator: the specs that a contract is tested with."""

    def decorate(contract):
        contract.specs = specs
        contract.bfloat16 = bfloat16
        return contract

    return decorate


@parameters(projection_specs, ("plain", "wide", "from_heads"))
class ProjectionContract(Contract):
    op = "projection"

    @staticmethod
    def float64(spec, inputs, kernel):
        return [np.tensordot(inputs, kernel, axes=len(spec.width))]


@parameters(causal_specs, ("plain", "everything"))
class CausalAttentionContract(Contract):
    op = "causal_attention"

    @staticmethod
    def float64(spec, query, key, value):
        output = np.zeros(query.shape)
        index = np.arange(spec.length)
        distance = index[:, None] - index
        for b, h in np.ndindex(spec.batch, spec.heads):
            seen = distance >= 0
            if spec.sliding_window is not None:
                seen = seen & (distance < spec.sliding_window)
            if spec.starts:
                seen = seen & (index >= spec.places()[b][:, None])
            kv = h // (spec.heads // spec.kv_heads)
            output[b, :, h] = attention_float64(
                query[b, :, h], key[b, :, kv], value[b, :, kv], seen,
                spec.scale, spec.soft_cap,
            )  # fmt: skip
        return [output]


@parameters(strided_specs, ("plain", "everything"))
class StridedAttentionContract(Contract):
    op = "strided_attention"

    @staticmethod
    def float64(spec, query, key, value, document_key=None, document_value=None):
        output = np.zeros(query.shape)
        anchors, starts = spec.places()
        step = spec.query_offset + np.arange(spec.queries)
        shape = (spec.batch, spec.samples, spec.blocks, spec.heads)
        for b, j, k, h in np.ndindex(shape):
            kv = h // (spec.heads // spec.kv_heads)
            keys, values = key[b, j, k, :, kv], value[b, j, k, :, kv]
            own = np.arange(spec.keys)
            if document_key is not None:
                anchor = np.broadcast_to(anchors, shape[::2])[b, k]
                start = 0 if starts is None else starts[b, k]
                own = np.concatenate([np.arange(start, anchor) - anchor, own])
                keys = np.concatenate([document_key[b, start:anchor, kv], keys])
                values = np.concatenate([document_value[b, start:anchor, kv], values])
            distance = step[:, None] - own
            seen = distance >= 0
            if spec.sliding_window is not None:
                seen &= distance < spec.sliding_window
            output[b, j, k, :, h] = attention_float64(
                query[b, j, k, :, h], keys, values, seen, spec.scale, spec.soft_cap
            )
        return [output]


@parameters(logprob_specs, ("sampled", "everything"))
class LinearLogprobContract(Contract):
    op = "linear_logprob"

    @staticmethod
    def float64(spec, hidden, head):
        logits = hidden @ head.T
        if spec.soft_cap is not None:
            logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
        log_p = logits / spec.temperature
        largest = log_p.max(axis=1, keepdims=True)
        log_p = log_p - largest - np.log(np.exp(log_p - largest).sum(1, keepdims=True))
        entropy = -(np.exp(log_p) * log_p).sum(axis=1)
        return [log_p[np.arange(spec.rows), spec.places()], entropy]


def assert_no_gradient(contract, function):
    """The operation with the contract's implementation forced, beside what has one."""
    arrays = [tensor(array) for array in contract.specs.SPECS[0].arrays().values()]
    variables = [keras.Variable(array) for array in arrays]

    def loss():
        values = [variable.value for variable in variables]
        return ops.sum(function(*values)) + 2.0 * sum(ops.sum(v) for v in values)

    kernels.set_implementation(contract.op, contract.name)
    try:
        with kernels.watch_choices() as choices:
            found = gradients(loss, variables)
    finally:
        kernels.set_implementation(contract.op, None)
    # It may make choices of its own, of a product.
    assert choices[contract.op] == {contract.name}
    for gradient in found:
        np.testing.assert_array_equal(to_numpy(gradient), 2.0)


@parameters(sample_specs, ("plain", "capped"))
class LinearSampleContract:
    """No gradients: tokens and their log-probabilities."""

    op = "linear_sample"
    name = None

    run = Contract.run
    supported = Contract.supported

    def drawn(self, spec, run, dtype="float32", rows=slice(None)):
        arrays = {k: tensor(v, dtype) for k, v in spec.arrays().items()}
        tokens, log_prob = run(
            arrays["hidden"][rows],
            arrays["head"],
            tensor(spec.places()[rows]),
            **spec.options(),
        )
        return to_numpy(tokens), to_numpy(log_prob)

    def check_tokens(self, spec, run=None):
        """Tokens are the definition's; whatever drew them, rounding may move edges."""
        run = run or self.run
        tokens, log_prob = self.drawn(spec, run)
        reference = implementation(self.op, "reference").load()
        expected, _ = self.drawn(spec, reference)
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, expected)
        off, log_prob_off = sample_errors(spec, tokens, log_prob)
        assert off.max() < EDGE_TOLERANCE
        assert log_prob_off.max() < LOG_PROB_TOLERANCE

    def test_equals_the_definition(self, spec):
        self.supported(spec)
        self.check_tokens(spec)

    def test_equals_the_definition_in_bfloat16(self, bfloat16_spec):
        """As far from float64 of the rounded inputs as the definition, at most."""
        spec = bfloat16_spec
        self.supported(spec)
        reference = implementation(self.op, "reference").load()
        found, plain = (
            sample_errors(spec, *self.drawn(spec, run, "bfloat16"), "bfloat16")
            for run in (self.run, reference)
        )
        for one, two in zip(found, plain):
            assert one.max() < 1.5 * two.max() + 1e-5
        assert plain[1].max() < 0.1

    def test_nothing_has_a_gradient(self):
        places = tensor(self.specs.SPECS[0].places())
        assert_no_gradient(self, lambda *t: kernels.linear_sample(*t, places)[1])

    def test_a_number_decides_its_token_whatever_the_rows_around(self):
        spec = self.specs.SPECS[0]
        tokens, log_prob = self.drawn(spec, self.run)
        for rows in (slice(3, 20), slice(30, 31)):
            found, found_log_prob = self.drawn(spec, self.run, rows=rows)
            np.testing.assert_array_equal(found, tokens[rows])
            np.testing.assert_allclose(found_log_prob, log_prob[rows], atol=1e-5)

    def test_the_first_of_the_likeliest_is_taken(self):
        """Two equal rows of the head in one group, and one in another."""
        head = np.zeros((300, 4), dtype="float32")
        head[[7, 90, 200]] = 1.0
        hidden = np.ones((2, 4), dtype="float32")
        tokens, log_prob = self.run(
            tensor(hidden),
            tensor(head),
            tensor(np.zeros(2, "float32")),
            temperature=0.0,
        )
        assert to_numpy(tokens).tolist() == [7, 7]
        expected = 4 - np.log(3 * np.exp(4) + 297)
        np.testing.assert_allclose(to_numpy(log_prob), expected, rtol=1e-5)

    @pytest.mark.parametrize("planted", ["uniform", "token", "log_prob"])
    def test_a_planted_wrong_result_is_noticed(self, planted):
        spec = self.specs.SPECS[0]

        def wrong(hidden, head, uniform, **options):
            if planted == "uniform":
                uniform = ops.maximum(uniform - 1e-2, 0.0)
            tokens, log_prob = self.run(hidden, head, uniform, **options)
            if planted == "token":
                first = ops.cast(ops.arange(spec.rows) == 0, "int32")
                tokens = ops.where(first == 1, tokens + 1, tokens)
            if planted == "log_prob":
                log_prob = log_prob + 1e-4
            return tokens, log_prob

        with pytest.raises(AssertionError):
            self.check_tokens(spec, wrong)

    def test_draws_from_the_distribution(self):
        """Chi-square against the exact distribution, edges of tiles included."""
        spec = sample_specs.Spec("draws", rows=1, vocabulary=150, temperature=0.8)
        arrays = spec.arrays()
        logits = (arrays["hidden"] @ arrays["head"].T)[0].astype("float64") / 0.8
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        draws = 4096
        uniform = np.random.default_rng(0).random(draws).astype("float32")
        tokens, log_prob = self.run(
            tensor(np.repeat(arrays["hidden"], draws, axis=0)),
            tensor(arrays["head"]),
            tensor(uniform),
            **spec.options(),
        )
        tokens = to_numpy(tokens)
        np.testing.assert_allclose(
            to_numpy(log_prob), np.log(probability)[tokens], atol=1e-5
        )
        # Tokens expected less than five times are counted as one.
        counts = np.bincount(tokens, minlength=150)
        often = probability * draws >= 5
        observed = np.append(counts[often], counts[~often].sum())
        expected = draws * np.append(probability[often], probability[~often].sum())
        freedom = len(observed) - 1
        # Three standard deviations above the mean.
        statistic = np.sum((observed - expected) ** 2 / expected)
        assert statistic < freedom + 3 * np.sqrt(2 * freedom)
        assert len(observed) > 20


def rewards_float64(spec, generated, target):
    """Vectors whitened one by one with D x D or n x n matrices, in float64."""
    shape = (spec.batch, spec.samples, spec.blocks)
    found = {name: np.zeros(shape) for name in ("alignment", "diversity")}
    losses = {"feature_matching_loss": np.zeros(shape[::2])}
    losses["whitened_feature_matching_loss"] = np.zeros(shape[::2])
    for b, k in np.ndindex(shape[::2]):
        rows, truths = [], []
        for f in range(spec.features):
            row, truth = generated[b, :, k, f], target[b, k, f]
            losses["feature_matching_loss"][b, k] += np.sum((row.mean(0) - truth) ** 2)
            truth = np.repeat(truth[None], spec.samples, axis=0)
            if spec.whitening == "rollout":
                root = inverse_root(row @ row.T)
                row, truth = root @ row, root @ truth
            elif spec.whitening == "feature":
                root = inverse_root(row.T @ row / spec.samples)
                row, truth = row @ root, truth @ root
            rows.append(row)
            truths.append(truth)
        row, truth = np.concatenate(rows, axis=1), np.concatenate(truths, axis=1)
        distance = np.sum((row.mean(0) - truth.mean(0)) ** 2)
        losses["whitened_feature_matching_loss"][b, k] = distance
        norms = np.linalg.norm(row, axis=1) * np.linalg.norm(truth, axis=1)
        found["alignment"][b, :, k] = 2 * np.sum(row * truth, axis=1) / norms
        gram = row @ row.T
        others = gram.sum(axis=1) - np.diag(gram)
        found["diversity"][b, :, k] = 2 * others / max(spec.samples - 1, 1)
    if spec.whitening is None:
        del losses["whitened_feature_matching_loss"]
    return {**found, **losses}


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-6 * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


@parameters(reward_specs, ("plain", "everything"))
class FeatureRewardContract:
    """No gradients: everything that is made of a block's features."""

    op = "feature_reward"
    name = None

    run = Contract.run
    supported = Contract.supported

    def measured(self, spec, run=None, dtype="float32"):
        arrays = [tensor(array, dtype) for array in spec.arrays().values()]
        found = (run or self.run)(*arrays, **spec.options())
        return {name: to_numpy(value) for name, value in found.items()}

    def check(self, spec, run=None, dtype="float32"):
        """The definition reads bfloat16 as float32: no more is lost there."""
        reference = implementation(self.op, "reference").load()
        exact = self.measured(spec, reference, dtype)
        found = self.measured(spec, run, dtype)
        assert found.keys() == exact.keys()
        for name, value in found.items():
            assert value.dtype == np.float32
            self.close(value, exact[name])

    @staticmethod
    def close(found, expected):
        assert found.shape == expected.shape
        assert np.isfinite(found).all()
        # Divided by a standard deviation of rounding errors, advantages are noise.
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)

    def test_equals_the_definition(self, spec):
        self.supported(spec)
        self.check(spec)

    def test_equals_the_definition_in_bfloat16(self, bfloat16_spec):
        self.supported(bfloat16_spec)
        self.check(bfloat16_spec, dtype="bfloat16")

    def test_equals_whitened_vectors_in_float64(self, spec):
        self.supported(spec)
        arrays = {k: v.astype("float64") for k, v in spec.arrays().items()}
        found = self.measured(spec)
        for name, expected in rewards_float64(spec, **arrays).items():
            self.close(found[name], expected)

    @pytest.mark.parametrize("name", ["alignment", "advantage", "reward"])
    def test_a_planted_wrong_result_is_noticed(self, name):
        def wrong(*tensors, **options):
            found = self.run(*tensors, **options)
            return {**found, name: found[name] * 1.001}

        with pytest.raises(AssertionError):
            self.check(self.specs.SPECS[0], wrong)

    def test_nothing_has_a_gradient(self):
        assert_no_gradient(self, lambda x, t: kernels.feature_reward(x, t)["reward"])

    def test_features_of_zero_give_finite_rewards(self):
        for whitening in ("rollout", "feature", None):
            found = self.run(
                ops.zeros((1, 3, 1, 1, 4)), ops.zeros((1, 1, 1, 4)), whitening=whitening
            )
            for value in found.values():
                np.testing.assert_array_equal(to_numpy(value), 0.0 * to_numpy(value))
