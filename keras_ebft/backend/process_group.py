"""What processes that train together say to each other, on every backend."""

from collections.abc import Sequence
from typing import Any, Protocol

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor


class ProcessGroup(Protocol):
    """The processes that train one model; all of them make every call.

    Attributes:
        size: how many they are, an int.
        index: which of them this is, an int from 0.
        shares_out_rows: whether each computes with rows of its own, by a program of its
            own; on JAX one program runs on the devices of all.
    """

    size: int
    index: int
    shares_out_rows: bool

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The rows of all processes, in their order, without a gradient.

        Args:
            tensors: list of tensors `[b, ...]`, of the same shapes in every process.

        Returns:
            list of tensors `[size * b, ...]`.
        """

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, sent as one piece.

        Args:
            tensors: list of float tensors of one dtype, the same in every process;
                memory of theirs may be written to.

        Returns:
            list of tensors of the same shapes, the same bits in every process.
        """

    def from_first(self, tensor: Tensor) -> Tensor:
        """The tensor that the first process passes, in every process."""

    def object_from_first(self, value: Any) -> Any:
        """What the first process passes, in every process; `pickle` can write it."""

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any process passes, number by number.

        Args:
            numbers: list of ints, as many in every process.
        """

    def wait(self) -> None:
        """Returns when every process has come here."""


class OneProcess:
    """A process that trains alone."""

    size = 1
    index = 0
    shares_out_rows = False

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `ProcessGroup`."""
        return list(tensors)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `ProcessGroup`."""
        return list(tensors)

    def from_first(self, tensor: Tensor) -> Tensor:
        """See `ProcessGroup`."""
        return tensor

    def object_from_first(self, value: Any) -> Any:
        """See `ProcessGroup`."""
        return value

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """See `ProcessGroup`."""
        return list(numbers)

    def wait(self) -> None:
        """See `ProcessGroup`."""


def process_group() -> ProcessGroup:
    """The processes that this one trains with, as they are now."""
    if backend_name() == "torch":
        from keras_ebft.backend.torch_processes import find_processes
    elif backend_name() == "tensorflow":
        from keras_ebft.backend.tensorflow_processes import find_processes
    else:
        from keras_ebft.backend.jax_processes import find_processes
    return find_processes() or OneProcess()
