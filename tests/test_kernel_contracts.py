"""The plain implementations of every hot path under its contract."""

import ast
from pathlib import Path

import pytest
from kernel_contracts import (
    CausalAttentionContract,
    LinearLogprobContract,
    LinearSampleContract,
    StridedAttentionContract,
    error,
)

from keras_ebft import kernels
from keras_ebft.kernels import row_chunks

OPS = ("causal_attention", "linear_logprob", "linear_sample", "strided_attention")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", 400)
    monkeypatch.setattr(row_chunks, "MIN_CHUNK_ROWS", 8)


class TestCausalReference(CausalAttentionContract):
    name = "reference"


class TestStridedReference(StridedAttentionContract):
    name = "reference"


class TestStridedTiled(StridedAttentionContract):
    name = "tiled"


class TestLogprobReference(LinearLogprobContract):
    name = "reference"


@pytest.mark.usefixtures("small_chunks")
class TestLogprobChunked(LinearLogprobContract):
    name = "chunked"


class TestSampleReference(LinearSampleContract):
    name = "reference"


@pytest.mark.usefixtures("small_chunks")
class TestSampleChunked(LinearSampleContract):
    name = "chunked"


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
