"""Replicas that share a batch: processes of PyTorch and TensorFlow, devices of JAX.

On PyTorch and TensorFlow every process runs the same program on the same data. Within
`shared_step` it reads its own rows of a batch; what it said of them is put together
with what the others said before anything is averaged, so that losses and metrics are
computed of the whole batch, in every process alike. Its gradient is that of its own
rows, and the sum over processes is the batch's.

On JAX one program runs on all devices of a `keras.distribution`, and its means are
those of the whole batch anyway: here batches are filled up and shared out, nothing
else.

With one replica nothing of this computes or communicates anything.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_ebft.backend.process_group import process_group
from keras_ebft.backend.runtime import after, backend_name, no_gradient
from keras_ebft.typing import Tensor

# Elements of gradients that are summed in one call: enough to be worth it, few enough
# to be held twice.
BUCKET = 2**23

# While `shared_step` is open.
_shared: list[bool] = []


def num_processes() -> int:
    """How many processes train one model together, an int."""
    return process_group().size


def process_index() -> int:
    """Which of the processes this is, an int from 0."""
    return process_group().index


def is_first() -> bool:
    """Whether this is the process that writes files, logs and the progress bar."""
    return process_index() == 0


@contextlib.contextmanager
def own_path(path: Any) -> Iterator[Any]:
    """Context with the path that this process writes a model to.

    Args:
        path: path of a file or folder.

    Yields:
        `path` in the first process. In others `None`, or on JAX, where all processes
        take part in reading weights, a path that is gone afterwards.
    """
    if is_first():
        yield path
    elif process_group().shares_out_rows:
        yield None
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield os.path.join(folder, os.path.basename(os.fspath(path)))


def num_shares() -> int:
    """Parts of equal size that a batch is cut into, an int."""
    if backend_name() != "jax":
        return num_processes()
    distribution: Any = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    return int(sizes.get(distribution.batch_dim_name, 1))


def parts_of_program(rows: int) -> int:
    """Parts that the devices of one program cut rows of a batch into.

    Args:
        rows: int, a multiple of the rows of the batch, those of the first device first.

    Returns:
        int, 1 where every device has a program of its own, or does not have as many
        rows as the others.
    """
    parts = num_shares() if backend_name() == "jax" else 1
    return parts if rows % parts == 0 else 1


def rows_of_process(values: np.ndarray) -> np.ndarray:
    """The rows of a batch that this process hands to its devices.

    Args:
        values: array `[B, ...]`, B a multiple of `num_shares()`.

    Returns:
        array `[b, ...]`.
    """
    if num_processes() == 1:
        return values
    if process_group().shares_out_rows:
        return values[_own(len(values))]
    distribution: Any = keras.distribution.distribution()
    layout = distribution.get_data_layout(values.shape).backend_layout
    places = layout.addressable_devices_indices_map(values.shape).values()
    rows = {row for place in places for row in range(len(values))[place[0]]}
    return values[sorted(rows)]


@contextlib.contextmanager
def shared_step() -> Iterator[None]:
    """Context of a step that all processes run at once, each with its own rows."""
    _shared.append(True)
    try:
        yield
    finally:
        _shared.pop()


def rows_together(rows: int) -> int:
    """How many rows the replicas of a step have together.

    Args:
        rows: int, rows of this process.
    """
    return rows * num_processes() if _in_shared_step() else rows


def own_rows(values: Tensor, rows: int) -> Tensor:
    """This replica's rows of what belongs to the whole batch.

    Args:
        values: tensor `[B, ...]`, without the rows that fill a batch up.
        rows: int, rows that this replica has.

    Returns:
        tensor `[rows, ...]`, 0 in rows that fill the batch up.
    """
    missing = rows_together(rows) - values.shape[0]
    if 0 < missing < num_shares():
        nothing = [(0, 0)] * (len(values.shape) - 1)
        values = keras.ops.pad(values, [(0, missing), *nothing])
    return values[_own(values.shape[0])] if _in_shared_step() else values


def all_rows(structure: Any) -> Any:
    """What all replicas know of their rows, in the order of the batch.

    Args:
        structure: nested tuples, lists and dicts; of its tensors, `[b, ...]`, the
            rows of all replicas are put together; all else stays as it is.

    Returns:
        The structure with tensors `[B, ...]`. Each has the gradient that it has here;
        rows of others have none.
    """
    if not _in_shared_step():
        return structure
    leaves = keras.tree.flatten(structure)
    places = [i for i, leaf in enumerate(leaves) if keras.ops.is_tensor(leaf)]
    own = [leaves[place] for place in places]
    for place, tensor, found in zip(places, own, process_group().gather(own)):
        rows = _own(found.shape[0])
        parts = [found[: rows.start], tensor, found[rows.stop :]]
        leaves[place] = keras.ops.concatenate(parts)
    return keras.tree.pack_sequence_as(structure, leaves)


def counted_once(value: Tensor) -> Tensor:
    """A value that all replicas computed, whose gradients sum up to one of them.

    Args:
        value: scalar that depends on no rows.
    """
    if not _in_shared_step():
        return value
    share = value / num_processes()
    return share + keras.ops.stop_gradient(value - share)


def summed_gradients(gradients: Sequence[Any]) -> list[Any]:
    """Gradients summed over the replicas of a step.

    Args:
        gradients: list of float tensors, or `None` for variables without one;
            memory of theirs may be written to.

    Returns:
        list of tensors, the same in every process.
    """
    summed = list(gradients)
    if not _in_shared_step():
        return summed
    waited_for: Any = ()
    for places in _buckets(summed):
        parts = [summed[place] for place in places]
        # One after the other: in the same order in every process.
        with after(*waited_for):
            waited_for = process_group().sum(parts)
        for place, part in zip(places, waited_for):
            summed[place] = part
    return summed


def follow_first(variables: Sequence[keras.Variable]) -> None:
    """Gives variables the values that they have in the first process.

    Args:
        variables: list of Keras variables, the same in every process.
    """
    group = process_group()
    if not group.shares_out_rows:
        return
    with no_gradient():
        for variable in variables:
            variable.assign(group.from_first(variable.value))


def from_first(value: Any) -> Any:
    """What the first process passes, in every process.

    Args:
        value: anything that `pickle` can write; looked at in the first process alone.
    """
    return process_group().object_from_first(value)


def largest(numbers: Sequence[int]) -> list[int]:
    """The largest that any process passes, number by number.

    Args:
        numbers: list of ints, as many in every process.
    """
    return process_group().largest(numbers)


def wait_for_all() -> None:
    """Waits until every process has come here."""
    process_group().wait()


def _in_shared_step() -> bool:
    return bool(_shared) and process_group().shares_out_rows


def _own(rows: int) -> slice:
    share = rows // num_processes()
    return slice(process_index() * share, (process_index() + 1) * share)


def _buckets(gradients: Sequence[Any]) -> Iterator[list[int]]:
    """Places of gradients of one dtype that are summed together."""
    places: list[int] = []
    size = 0
    for place, gradient in enumerate(gradients):
        if gradient is None:
            continue
        more = math.prod(gradient.shape)
        if places and (
            size + more > BUCKET or gradient.dtype != gradients[places[0]].dtype
        ):
            yield places
            places, size = [], 0
        places.append(place)
        size += more
    if places:
        yield places
