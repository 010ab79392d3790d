"""Processes of TensorFlow that a `MultiWorkerMirroredStrategy` brought together.

Making the strategy starts the server of every process, and that is all of it that is
used: its scope would mirror variables whose gradients Keras sums a second time. What
processes say to each other are TensorFlow's collective operations. Each has a number,
which has to be the same in all processes: they are counted, and all processes run the
same program.
"""

import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_ebft.backend.process_group import ProcessGroup

# Groups of devices: any numbers that the strategy itself, which counts from 1, does
# not come to.
GRADIENTS, WORDS = 1_000_001, 1_000_002

_numbers = itertools.count(1)


def find_processes() -> ProcessGroup | None:
    """The processes, where a strategy has brought several together."""
    tasks = tasks_of_cluster()
    return TensorFlowProcesses(tasks) if len(tasks) > 1 else None


def tasks_of_cluster() -> list[tuple[str, int]]:
    """`(job, number)` of every process that this one knows, in one order for all."""
    places = {_place_of(device.name) for device in tf.config.list_logical_devices()}
    return sorted(place for place in places if place is not None)


def expected_processes() -> int:
    """How many processes the environment says train together, an int from 1."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    jobs = resolver.cluster_spec().as_dict()
    return max(sum(len(jobs.get(job, ())) for job in ("chief", "worker")), 1)


def accelerators_of_process() -> int:
    """Devices of this process that are no CPU, an int."""
    own = _own_place()
    devices = tf.config.list_logical_devices()
    return sum(d.device_type != "CPU" and _place_of(d.name) == own for d in devices)


def _place_of(device: str) -> tuple[str, int] | None:
    spec = tf.DeviceSpec.from_string(device)
    return None if spec.job is None else (spec.job, spec.task)


def _own_place() -> tuple[str, int] | None:
    with tf.init_scope():
        return _place_of(tf.constant(0).device)


class TensorFlowProcesses:
    """`ProcessGroup` of a cluster, each process with one device."""

    shares_out_rows = True

    def __init__(self, tasks: list[tuple[str, int]]) -> None:
        self.size = len(tasks)
        own = _own_place()
        self.index = next(i for i, task in enumerate(tasks) if task == own)

    def gather(self, tensors: Sequence[Any]) -> list[Any]:
        """See `ProcessGroup`."""
        parts = [tf.stop_gradient(tensor) for tensor in tensors]
        words = [_as_words(part) for part in parts]
        with tf.device("CPU:0"):
            whole = tf.raw_ops.CollectiveGatherV2(
                input=tf.concat(words, 0), ordering_token=[], **self._of(WORDS)
            )
        sizes = [word.shape[0] for word in words]
        by_process = [tf.split(own, sizes) for own in tf.split(whole, self.size)]
        return [
            tf.concat([_from_words(piece, part) for piece in pieces], 0)
            for part, pieces in zip(parts, zip(*by_process))
        ]

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        """See `ProcessGroup`."""
        flat = [tf.reshape(tensor, [-1]) for tensor in tensors]
        whole = self._sum(tf.concat(flat, 0), GRADIENTS)
        pieces = tf.split(whole, [piece.shape[0] for piece in flat])
        return [
            tf.reshape(piece, tensor.shape) for piece, tensor in zip(pieces, tensors)
        ]

    def from_first(self, tensor: Any) -> Any:
        """See `ProcessGroup`."""
        tensor = tf.convert_to_tensor(tensor)
        words = _as_words(tensor)
        return _from_words(self._words_of_first(words), tensor)

    def object_from_first(self, value: Any) -> Any:
        """See `ProcessGroup`."""
        data = np.frombuffer(b"" if self.index else pickle.dumps(value), "uint8")
        size = int(self._words_of_first(tf.constant([data.size]))[0])
        data = np.zeros(size, "uint8") if self.index else data
        return pickle.loads(bytes(self.from_first(tf.constant(data)).numpy()))

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """See `ProcessGroup`."""
        (found,) = self.gather([tf.constant([list(numbers)], tf.int64)])
        return [int(number) for number in tf.reduce_max(found, axis=0)]

    def wait(self) -> None:
        """See `ProcessGroup`."""
        self._words_of_first(tf.constant([0])).numpy()

    def _words_of_first(self, words: Any) -> Any:
        # Integers: what is added to nothing keeps its bits.
        with tf.device("CPU:0"):
            return self._sum(tf.zeros_like(words) if self.index else words, WORDS)

    def _sum(self, tensor: Any, group: int) -> Any:
        return tf.raw_ops.CollectiveReduceV2(
            input=tensor,
            merge_op="Add",
            final_op="Id",
            ordering_token=[],
            **self._of(group),
        )

    def _of(self, group: int) -> dict[str, Any]:
        return {
            "group_size": self.size,
            "group_key": group,
            "instance_key": next(_numbers),
        }


def _as_words(tensor: Any) -> Any:
    """A tensor as int32 `[W]`, what collective operations take of all dtypes."""
    whole = _whole_of(tensor.dtype)
    if tensor.dtype.is_floating:
        tensor = tf.bitcast(tensor, whole)
    words = tf.cast(tensor, whole)
    words = tf.bitcast(words, tf.int32) if whole.size > 2 else tf.cast(words, tf.int32)
    return tf.reshape(words, [-1])


def _from_words(words: Any, like: Any) -> Any:
    """The tensor of a dtype and shape that `_as_words` made words of."""
    whole = _whole_of(like.dtype)
    if whole.size > 4:
        words = tf.reshape(words, [-1, whole.size // 4])
    found = tf.bitcast(words, whole) if whole.size > 2 else tf.cast(words, whole)
    if like.dtype.is_floating:
        found = tf.bitcast(found, like.dtype)
    return tf.reshape(tf.cast(found, like.dtype), like.shape)


def _whole_of(dtype: Any) -> Any:
    """The integers of the size of a dtype; no smaller ones than two bytes."""
    return {8: tf.int64, 4: tf.int32}.get(dtype.size, tf.uint16)
