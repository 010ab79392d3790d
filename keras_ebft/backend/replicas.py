"""Replicas that share a batch: processes of PyTorch, devices of JAX.

On PyTorch every process runs the same program on the same data. Within `shared_step`
it reads its own rows of a batch; what it said of them is put together with what the
others said before anything is averaged, so that losses and metrics are computed of
the whole batch, in every process alike. Its gradient is that of its own rows, and the
sum over processes is the batch's.

On JAX one program runs on all devices of a `keras.distribution`, and its means are
those of the whole batch anyway: here batches are filled up and shared out, nothing
else.

With one replica nothing of this computes or communicates anything.
"""

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor

# Bytes of gradients that are summed in one call: enough to be worth it, few enough
# to be held twice.
BUCKET = 2**25

# While `shared_step` is open.
_shared: list[bool] = []


def num_processes() -> int:
    """How many processes train one model together, an int."""
    if backend_name() == "torch":
        return _torch_group().get_world_size() if _torch_group() else 1
    if backend_name() == "jax":
        import jax

        return jax.process_count()
    return 1


def process_index() -> int:
    """Which of the processes this is, an int from 0."""
    if num_processes() == 1:
        return 0
    if backend_name() == "torch":
        return _torch_group().get_rank()
    import jax

    return jax.process_index()


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
    elif backend_name() == "torch":
        yield None
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield os.path.join(folder, os.path.basename(os.fspath(path)))


def num_shares() -> int:
    """Parts of equal size that a batch is cut into, an int."""
    if backend_name() == "torch":
        return num_processes()
    distribution: Any = keras.distribution.distribution()
    if distribution is None or backend_name() != "jax":
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
    parts = 1 if backend_name() == "torch" else num_shares()
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
    if backend_name() == "torch":
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
    import torch

    leaves = keras.tree.flatten(structure)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    found = _torch_gather().apply(*(leaves[place] for place in places))
    for place, tensor in zip(places, found):
        leaves[place] = tensor
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
    if not _in_shared_step():
        return list(gradients)
    summed = list(gradients)
    for places in _buckets(summed):
        _sum_bucket(summed, places)
    return summed


def follow_first(variables: Sequence[keras.Variable]) -> None:
    """Gives variables the values that they have in the first process.

    Args:
        variables: list of Keras variables, the same in every process.
    """
    if backend_name() != "torch" or num_processes() == 1:
        return
    import torch

    with torch.no_grad():
        for variable in variables:
            # A copy, because the memory of some cannot be received into.
            value = variable.value.detach().contiguous().clone()
            _torch_group().broadcast(value, src=0)
            variable.assign(value)


def from_first(value: Any) -> Any:
    """What the first process passes, in every process.

    Args:
        value: anything that `pickle` can write; looked at in the first process alone.
    """
    if num_processes() == 1:
        return value
    if backend_name() == "torch":
        held = [value]
        _torch_group().broadcast_object_list(held, src=0)
        return held[0]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value) if is_first() else b"", "uint8")
    size = int(multihost_utils.broadcast_one_to_all(np.array(data.size, "int32")))
    data = np.resize(data, size) if is_first() else np.zeros(size, "uint8")
    return pickle.loads(
        np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes()
    )


def wait_for_all() -> None:
    """Waits until every process has come here."""
    if num_processes() == 1:
        return
    if backend_name() == "torch":
        _torch_group().barrier()
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("keras_ebft")


def _in_shared_step() -> bool:
    return bool(_shared) and backend_name() == "torch" and num_processes() > 1


def _own(rows: int) -> slice:
    share = rows // num_processes()
    return slice(process_index() * share, (process_index() + 1) * share)


def _torch_group() -> Any:
    """`torch.distributed` where a group of processes was made, or `None`."""
    import torch

    group = torch.distributed
    return group if group.is_available() and group.is_initialized() else None


def _buckets(gradients: Sequence[Any]) -> Iterator[list[int]]:
    """Places of gradients of one dtype that are summed together."""
    places: list[int] = []
    size = 0
    for place, gradient in enumerate(gradients):
        if gradient is None:
            continue
        more = gradient.numel() * gradient.element_size()
        if places and (
            size + more > BUCKET or gradient.dtype != gradients[places[0]].dtype
        ):
            yield places
            places, size = [], 0
        places.append(place)
        size += more
    if places:
        yield places


def _sum_bucket(gradients: list[Any], places: list[int]) -> None:
    import torch

    parts = [gradients[place] for place in places]
    if len(parts) == 1:
        whole = parts[0].contiguous()
        _torch_group().all_reduce(whole)
        gradients[places[0]] = whole
        return
    whole = torch.cat([part.reshape(-1) for part in parts])
    _torch_group().all_reduce(whole)
    pieces = torch.split(whole, [part.numel() for part in parts])
    for place, part, piece in zip(places, parts, pieces):
        # Into the memory that is there already.
        gradients[place] = part.copy_(piece.view(part.shape))


_gather: list[Any] = []


def _torch_gather() -> Any:
    """The class of `all_rows`, made once where PyTorch is there."""
    if _gather:
        return _gather[0]
    import torch

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> tuple[Any, ...]:
            ctx.set_materialize_grads(False)
            found = _gathered(tensors)
            ctx.mark_non_differentiable(
                *(tensor for tensor in found if not tensor.is_floating_point())
            )
            return found

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            return tuple(None if g is None else g[_own(len(g))] for g in upstream)

    _gather.append(Gather)
    return Gather


def _gathered(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Tensors with the rows of all processes, sent as one piece."""
    import torch

    parts = [tensor.detach().contiguous() for tensor in tensors]
    data = [part.view(-1).view(torch.uint8) for part in parts]
    own = torch.cat(data)
    received = [torch.empty_like(own) for _ in range(num_processes())]
    _torch_group().all_gather(received, own)
    sizes = [len(piece) for piece in data]
    by_process = [torch.split(whole, sizes) for whole in received]
    return tuple(
        torch.cat([_as_before(piece, part) for piece in pieces])
        for part, pieces in zip(parts, zip(*by_process))
    )


def _as_before(piece: Any, part: Any) -> Any:
    # A copy begins where its dtype can be read.
    return piece.clone().view(part.dtype).view(part.shape)
