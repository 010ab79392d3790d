"""Triton kernels under their contracts, interpreted on the CPU.

Runs in a process of its own, started by `tests/test_triton.py`: whether Triton
interprets is decided when it is imported.
"""

import os
import sys
from pathlib import Path

import pytest

assert os.environ["TRITON_INTERPRET"] == "1"
assert os.environ["KERAS_BACKEND"] == "torch"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from kernel_contracts import LinearLogprobContract, StridedAttentionContract

from keras_ebft.kernels.linear_logprob import torch_triton as logprob
from keras_ebft.kernels.strided_attention import torch_triton as strided


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New tensors hold NaN: what a kernel leaves out is noticed."""

    def empty(*shape, **options):
        tensor = real(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

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
