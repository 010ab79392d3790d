"""Processes of JAX: one program on the devices of all of them."""

import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from keras_ebft.backend.process_group import OneProcess, ProcessGroup


def find_processes() -> ProcessGroup | None:
    """The processes, where there are several."""
    return JaxProcesses() if jax.process_count() > 1 else None


class JaxProcesses(OneProcess):
    """`ProcessGroup` of JAX.

    Rows, sums and variables are the program's own: it is one for all of them.
    """

    def __init__(self) -> None:
        self.size = jax.process_count()
        self.index = jax.process_index()

    def object_from_first(self, value: Any) -> Any:
        """See `ProcessGroup`."""
        broadcast = multihost_utils.broadcast_one_to_all
        data = np.frombuffer(b"" if self.index else pickle.dumps(value), "uint8")
        size = int(broadcast(np.array(data.size, "int32")))
        data = np.zeros(size, "uint8") if self.index else np.resize(data, size)
        return pickle.loads(np.asarray(broadcast(data)).tobytes())

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """See `ProcessGroup`."""
        found = multihost_utils.process_allgather(np.array(numbers, "int32"))
        return [int(number) for number in np.max(found, axis=0)]

    def wait(self) -> None:
        """See `ProcessGroup`."""
        multihost_utils.sync_global_devices("keras_ebft")
