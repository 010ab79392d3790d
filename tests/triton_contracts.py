"""Triton kernels under their contracts, interpreted on the CPU.

Runs in a process of its own, started by `tests/test_triton.py`: whether Triton
interprets is decided when it is imported.
"""

import numpy as np
import pytest
import torch
from helpers import documents, family, flat, gradients, to_numpy
from kernel_contracts import (
    FeatureRewardContract,
    LinearLogprobContract,
    LinearSampleContract,
    StridedAttentionContract,
    implementation,
)

import keras_ebft
from keras_ebft import kernels
from keras_ebft.kernels.linear_logprob import specs as logprob_specs
from keras_ebft.kernels.linear_logprob import torch_triton as logprob
from keras_ebft.kernels.strided_attention import torch_triton as strided
from keras_ebft.kernels.torch_triton_common import INTERPRETED

assert INTERPRETED, "Run this through tests/test_triton.py."


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New tensors hold NaN or -1: what a kernel leaves out is noticed."""

    def empty(*shape, **options):
        tensor = real(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    real = torch.empty
    monkeypatch.setattr(torch, "empty", empty)


class TestLogprobTriton(LinearLogprobContract):
    name = "triton"

    @pytest.fixture(autouse=True)
    def several_chunks(self, monkeypatch):
        monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", 37 * 256)
        monkeypatch.setattr(logprob, "MIN_PROGRAMS", 3)


class TestStridedTriton(StridedAttentionContract):
    name = "triton"

    @pytest.fixture(autouse=True)
    def several_splits(self, monkeypatch):
        monkeypatch.setattr(strided, "MIN_PROGRAMS", 16)


class TestRewardTriton(FeatureRewardContract):
    name = "triton"


class TestSampleTriton(LinearSampleContract):
    name = "triton"


PATHS = ("strided_attention", "linear_logprob", "linear_sample", "feature_reward")


@pytest.fixture
def forced():
    """Function that forces an implementation of the paths that have kernels."""

    def force(name):
        for op in PATHS:
            kernels.set_implementation(op, name)

    yield force
    force(None)


def test_a_step_with_kernels_equals_one_without(forced):
    """Gemma 2, with a window and both soft caps: tokens, scores, gradient."""
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=5, context_length=4, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(family("Gemma2"), sampler, network, seed=0)
    x = documents(2, 12)

    def measured():
        rollouts = model.rollout(x, seed=3)
        score = model.score(x, rollouts)
        variables = model.causal_lm.trainable_variables

        def loss():
            scores = model.score(x, rollouts)
            return scores["log_prob"].mean() + 0.3 * scores["document_log_prob"].mean()

        tokens, log_prob = (
            to_numpy(v) for v in (rollouts["token_ids"], score["log_prob"])
        )
        advantage = to_numpy(model.rewards(x, rollouts)["advantage"])
        return tokens, log_prob, advantage, flat(gradients(loss, variables))

    forced("reference")
    tokens, log_prob, advantage, gradient = measured()
    forced("triton")
    with kernels.watch_choices() as choices:
        found_tokens, found_log_prob, found_advantage, found_gradient = measured()
    # The other paths have no such kernels and take what suits the processor.
    assert {op: choices[op] for op in PATHS} == {op: {"triton"} for op in PATHS}
    np.testing.assert_array_equal(found_tokens, tokens)
    np.testing.assert_allclose(found_log_prob, log_prob, atol=1e-5)
    np.testing.assert_allclose(found_advantage, advantage, atol=1e-5)
    size = np.linalg.norm(gradient)
    assert np.linalg.norm(found_gradient - gradient) < 1e-5 * size
    assert size > 0.1


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_linear_logprob_of_what_is_frozen(frozen):
    """With adapters the head is not trained: its gradient must not be computed."""
    spec = logprob_specs.SPECS[0]
    arrays = {name: torch.from_numpy(v) for name, v in spec.arrays().items()}
    trained = next(name for name in arrays if name != frozen)
    arrays[trained].requires_grad_()
    labels = torch.from_numpy(spec.places())
    found = []
    for name in ("triton", "reference"):
        run = implementation("linear_logprob", name).load()
        log_prob, _ = run(*arrays.values(), labels)
        found.append(torch.autograd.grad(log_prob.sum(), arrays[trained])[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert arrays[frozen].grad is None


def test_a_head_may_be_a_transposed_view():
    """Untied heads are variables `[D, V]`."""
    spec = logprob_specs.SPECS[0]
    hidden, head = (torch.from_numpy(v) for v in spec.arrays().values())
    view = head.T.contiguous().T
    assert not view.is_contiguous()
    labels = torch.from_numpy(spec.places())
    for op, argument in (("linear_logprob", labels), ("linear_sample", torch.rand(37))):
        run = implementation(op, "triton").load()
        for one, two in zip(run(hidden, view, argument), run(hidden, head, argument)):
            torch.testing.assert_close(one, two)


def test_rewards_of_one_sample_on_an_axis_of_any_stride():
    """An axis of one is contiguous, whatever its stride says."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 2, 1, 5)))
    generated = values.float().permute(1, 0, 2, 3, 4)
    assert generated.is_contiguous() and generated.stride(1) == 3 * 2 * 5
    target = torch.ones((3, 2, 1, 5))
    run = implementation("feature_reward", "triton").load()
    found = run(generated, target)
    expected = run(generated.clone(memory_format=torch.contiguous_format), target)
    plain = implementation("feature_reward", "reference").load()(generated, target)
    for name in ("alignment", "feature_matching_loss"):
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(found[name], plain[name], atol=1e-4, rtol=1e-4)
