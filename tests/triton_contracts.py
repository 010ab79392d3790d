"""Triton kernels under their contracts, interpreted on the CPU.

Runs in a process of its own, started by `tests/test_triton.py`: whether Triton
interprets is decided when it is imported.
"""

import pytest
import torch
from kernel_contracts import (
    LinearLogprobContract,
    LinearSampleContract,
    StridedAttentionContract,
)

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


class TestSampleTriton(LinearSampleContract):
    name = "triton"
