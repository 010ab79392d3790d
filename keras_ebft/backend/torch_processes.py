"""Processes of PyTorch that `torch.distributed` brought together."""

from collections.abc import Sequence
from typing import Any

import torch

from keras_ebft.backend.process_group import ProcessGroup


def find_processes() -> ProcessGroup | None:
    """The processes, where a group of several was made."""
    group = torch.distributed
    if not group.is_available() or not group.is_initialized():
        return None
    return TorchProcesses() if group.get_world_size() > 1 else None


class TorchProcesses:
    """`ProcessGroup` of `torch.distributed`'s default group."""

    shares_out_rows = True

    def __init__(self) -> None:
        self.size = torch.distributed.get_world_size()
        self.index = torch.distributed.get_rank()

    def gather(self, tensors: Sequence[Any]) -> list[Any]:
        """See `ProcessGroup`."""
        parts = [tensor.detach().contiguous() for tensor in tensors]
        data = [part.view(-1).view(torch.uint8) for part in parts]
        own = torch.cat(data)
        received = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(received, own)
        sizes = [len(piece) for piece in data]
        by_process = [torch.split(whole, sizes) for whole in received]
        return [
            torch.cat([_as_before(piece, part) for piece in pieces])
            for part, pieces in zip(parts, zip(*by_process))
        ]

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        """See `ProcessGroup`."""
        if len(tensors) == 1:
            whole = tensors[0].contiguous()
            torch.distributed.all_reduce(whole)
            return [whole]
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(whole)
        pieces = torch.split(whole, [tensor.numel() for tensor in tensors])
        # Into the memory that is there already.
        return [
            tensor.copy_(piece.view(tensor.shape))
            for tensor, piece in zip(tensors, pieces)
        ]

    def from_first(self, tensor: Any) -> Any:
        """See `ProcessGroup`."""
        # A copy, because the memory of some cannot be received into.
        value = tensor.detach().contiguous().clone()
        torch.distributed.broadcast(value, src=0)
        return value

    def object_from_first(self, value: Any) -> Any:
        """See `ProcessGroup`."""
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """See `ProcessGroup`."""
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, list(numbers))
        return [max(of_all) for of_all in zip(*found)]

    def wait(self) -> None:
        """See `ProcessGroup`."""
        torch.distributed.barrier()


def _as_before(piece: Any, part: Any) -> Any:
    # A copy begins where its dtype can be read.
    return piece.clone().view(part.dtype).view(part.shape)
