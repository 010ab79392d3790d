"""The plain implementations of every hot path under its contract."""

import ast
from pathlib import Path

import keras
import pytest
from kernel_contracts import (
    CausalAttentionContract,
    FeatureRewardContract,
    LinearLogprobContract,
    LinearSampleContract,
    ProjectionContract,
    StridedAttentionContract,
    error,
    implementation,
)

from keras_ebft import kernels
from keras_ebft.kernels import attention_tiles, row_chunks
from keras_ebft.kernels.causal_attention import blockwise as causal
from keras_ebft.kernels.linear_logprob import chunked
from keras_ebft.kernels.strided_attention import blockwise as strided

OPS = (
    "causal_attention",
    "feature_reward",
    "linear_logprob",
    "linear_sample",
    "projection",
    "strided_attention",
)

on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's own fused attention"
)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", 400)
    monkeypatch.setattr(row_chunks, "MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr(chunked, "ROWS", 8)
    monkeypatch.setattr(chunked, "TOKENS", 64)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tiles, "KEY_TILE", 7)
    monkeypatch.setattr(attention_tiles, "LARGE_KEY_TILE", 8)
    monkeypatch.setattr(causal, "QUERY_TILE", 6)
    monkeypatch.setattr(strided, "FEWEST_QUERIES", 1)


class TestCausalReference(CausalAttentionContract):
    name = "reference"


@pytest.mark.usefixtures("small_tiles")
class TestCausalBlockwise(CausalAttentionContract):
    name = "blockwise"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's own call of it")
class TestCausalCudnn(CausalAttentionContract):
    """By XLA, which takes the same call where there is no GPU."""

    name = "cudnn"


@on_torch
class TestCausalFused(CausalAttentionContract):
    name = "fused"


class TestStridedReference(StridedAttentionContract):
    name = "reference"


@pytest.mark.usefixtures("small_tiles")
class TestStridedBlockwise(StridedAttentionContract):
    name = "blockwise"


@on_torch
@pytest.mark.usefixtures("small_tiles")
class TestStridedFused(StridedAttentionContract):
    name = "fused"

    @pytest.fixture(autouse=True)
    def some_spans_are_open(self, monkeypatch):
        from keras_ebft.kernels import torch_fused_attention

        monkeypatch.setattr(torch_fused_attention, "FEWEST_OPEN_KEYS", 3)


class TestLogprobReference(LinearLogprobContract):
    name = "reference"


@pytest.mark.usefixtures("small_chunks")
class TestLogprobChunked(LinearLogprobContract):
    name = "chunked"


@on_torch
@pytest.mark.usefixtures("small_chunks")
class TestLogprobInPlace(LinearLogprobContract):
    name = "in_place"


class TestProjectionReference(ProjectionContract):
    name = "reference"


class TestProjectionMatrices(ProjectionContract):
    name = "matrices"


@on_torch
class TestProjectionOneDnn(ProjectionContract):
    name = "onednn"

    @pytest.fixture(autouse=True)
    def never_too_small(self, monkeypatch):
        from keras_ebft.kernels.projection import torch_onednn

        monkeypatch.setattr(torch_onednn, "FEWEST_PRODUCTS", 0)


@on_torch
def test_onednn_is_given_no_memory_with_gaps(monkeypatch):
    """It takes it, and a thousand times as long."""
    import torch

    from keras_ebft.kernels.projection import torch_onednn

    monkeypatch.setattr(torch_onednn, "FEWEST_PRODUCTS", 0)
    given = []

    def linear(rows, matrix, *options):
        given.extend((rows, matrix))
        return rows @ matrix.t()

    monkeypatch.setattr(torch_onednn, "_linear", lambda: linear)
    whole = torch.arange(120.0).reshape(10, 12)
    cuts = whole[:, 1:7], whole[2:8, ::2], whole.t()[:6, 3:9], whole[:6, :6].t()
    for left in cuts:
        for right in cuts:
            found = torch_onednn._product(left[:, :6], right[:6])
            torch.testing.assert_close(found, left[:, :6] @ right[:6])
    for tensor in given:
        assert tensor.is_contiguous() or tensor.t().is_contiguous()


@on_torch
@pytest.mark.parametrize("outputs", [4, 30])
def test_the_smaller_side_is_copied_for_the_gradient_of_a_kernel(monkeypatch, outputs):
    """oneDNN reads rows one after another, and one side is the transposed inputs."""
    import torch

    from keras_ebft.kernels.projection import torch_onednn

    monkeypatch.setattr(torch_onednn, "FEWEST_PRODUCTS", 0)
    copied = []

    def linear(rows, matrix, *options):
        copied.append(rows.shape)
        return rows @ matrix.t()

    monkeypatch.setattr(torch_onednn, "_linear", lambda: linear)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn((50, 20), generator=random)
    upstream = torch.randn((50, outputs), generator=random)
    found = torch_onednn._product(inputs.t(), upstream)
    torch.testing.assert_close(found, inputs.t() @ upstream)
    assert copied == [(min(outputs, 20), 50)]


@on_torch
def test_a_gradient_that_nobody_asks_for_is_not_computed(monkeypatch):
    """By a frozen kernel of a projection, and by a frozen head."""
    import torch

    from keras_ebft.kernels.linear_logprob import torch_in_place
    from keras_ebft.kernels.linear_logprob.reference import linear_logprob_reference
    from keras_ebft.kernels.projection import torch_onednn

    linear_logprob_in_place = torch_in_place.linear_logprob_in_place

    random = torch.Generator().manual_seed(0)
    inputs = torch.randn((6, 5), generator=random, requires_grad=True)
    head = torch.randn((9, 5), generator=random)
    labels = torch.arange(6, dtype=torch.int32)
    products = []
    plain = torch_onednn._product
    monkeypatch.setattr(
        torch_onednn, "_product", lambda *given: products.append(1) or plain(*given)
    )
    torch_onednn.projection_onednn(inputs, head.t()).sum().backward()
    assert len(products) == 2
    torch.testing.assert_close(inputs.grad, head.sum(0).expand(6, 5))
    found = []
    runs = linear_logprob_in_place, chunked.linear_logprob_chunked
    for run in (*runs, linear_logprob_reference):
        inputs.grad = None
        log_prob, entropy = run(inputs, head, labels)
        (log_prob + 0.3 * entropy).sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
    products.clear()
    monkeypatch.setattr(
        torch_in_place, "projection", lambda *given: products.append(1) or plain(*given)
    )
    # Logits, again backwards, and the gradient by hidden states.
    sum(linear_logprob_in_place(inputs, head, labels)).sum().backward()
    assert len(products) == 3
    monkeypatch.setattr(chunked.RowChunks, "products", None)
    # With a head that is trained there would be an error.
    sum(chunked.linear_logprob_chunked(inputs, head, labels)).sum().backward()
    head.requires_grad_()
    with pytest.raises(TypeError):
        sum(chunked.linear_logprob_chunked(inputs, head, labels)).sum().backward()


class TestRewardReference(FeatureRewardContract):
    name = "reference"


class TestSampleReference(LinearSampleContract):
    name = "reference"


@pytest.mark.usefixtures("small_chunks")
class TestSampleChunked(LinearSampleContract):
    name = "chunked"


@on_torch
@pytest.mark.usefixtures("small_chunks")
class TestSampleInPlace(LinearSampleContract):
    name = "in_place"


@on_torch
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_what_is_given_is_not_written_over(temperature, soft_cap):
    import torch

    random = torch.Generator().manual_seed(0)
    options = {"temperature": temperature, "soft_cap": soft_cap}
    hidden, head = (
        torch.randn((size, 5), generator=random, requires_grad=True) for size in (8, 30)
    )
    labels = torch.arange(8, dtype=torch.int32)
    uniform = torch.rand((8,), generator=random)
    given = [tensor.detach().clone() for tensor in (hidden, head, labels, uniform)]
    logprob = implementation("linear_logprob", "in_place").load()
    for _ in range(2):
        log_prob, entropy = logprob(hidden, head, labels, **options)
        before = log_prob.detach().clone(), entropy.detach().clone()
        (log_prob - 0.3 * entropy).sum().backward()
        torch.testing.assert_close((log_prob, entropy), before, rtol=0, atol=0)
    implementation("linear_sample", "in_place").load()(hidden, head, uniform, **options)
    for tensor, was in zip((hidden, head, labels, uniform), given):
        torch.testing.assert_close(tensor.detach(), was, rtol=0, atol=0)


def contracted():
    """`(contract, name)` of every contract that is subclassed in some test module."""
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                for statement in node.body:
                    if ast.unparse(statement).startswith("name = '"):
                        name = ast.literal_eval(statement.value)
                        yield from ((base, name) for base in bases)


@pytest.mark.backend_independent
@pytest.mark.parametrize("op", OPS)
def test_every_implementation_has_a_contract(op):
    contract = "".join(part.capitalize() for part in op.split("_")) + "Contract"
    names = {name for base, name in contracted() if base == contract}
    assert names == {record.name for record in kernels.implementations(op)}


def test_error_is_relative_and_counts_every_element():
    import numpy as np

    expected = np.array([3.0, 4.0])
    assert error(np.array([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert np.isnan(error(np.array([3.0, np.nan]), expected))
    assert error(np.zeros(2), np.zeros(2)) == 0.0
    assert error(np.ones(2), np.zeros(2)) > 1e9
