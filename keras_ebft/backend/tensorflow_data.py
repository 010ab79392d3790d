"""Batches that Python makes, as TensorFlow reads them.

`tf.data.Dataset.from_generator` is not used: under Python 3.11 and later it sets the
size from which glibc maps memory anew to 128 KiB, for the whole process
(`mallopt(M_MMAP_THRESHOLD)`). Every larger tensor is then made of pages that the system
has to clear, which was a third of a training step on a CPU.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_ebft.backend.runtime import collect
from keras_ebft.typing import Tensor

Arrays = dict[str, np.ndarray]


def dataset_of(read: Callable[[], Iterator[Arrays]], specs: dict[str, Any]) -> Any:
    """What a function reads, as a data set.

    Args:
        read: function without arguments that returns an iterator of dicts of arrays;
            it is called whenever the data set is read from its beginning. What it
            raises ends the graph that asks.
        specs: dict from their names to `tf.TensorSpec`.

    Returns:
        `tf.data.Dataset` of dicts.
    """
    import tensorflow as tf

    readings = _Readings(read, specs)

    def one_reading(number: Tensor) -> Any:
        # Outside of Python only numbers tell one reading from the next.
        numbers = tf.data.Dataset.from_tensors(number).repeat()
        found = numbers.map(readings.batch).take_while(lambda _, is_one: is_one)
        return found.map(lambda batch, _: batch)

    return tf.data.Dataset.from_tensors(0).map(readings.number).flat_map(one_reading)


class _Readings:
    """The newest reading of a function; those before it are at their end."""

    def __init__(
        self, read: Callable[[], Iterator[Arrays]], specs: dict[str, Any]
    ) -> None:
        self.read = read
        self.specs = specs
        self.numbers = itertools.count()
        self.newest: tuple[int, Iterator[Arrays]] = (-1, iter(()))

    def number(self, _: Tensor) -> Tensor:
        """Begins to read; an int64 scalar."""
        import tensorflow as tf

        def begin(_: np.ndarray) -> np.int64:
            self.newest = next(self.numbers), iter(self.read())
            return np.int64(self.newest[0])

        return tf.ensure_shape(tf.numpy_function(begin, (_,), tf.int64), ())

    def batch(self, number: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The next batch of a reading, and whether there is one."""
        import tensorflow as tf

        types = [spec.dtype for spec in self.specs.values()]
        *arrays, is_one = tf.numpy_function(self._next, (number,), [*types, tf.bool])
        shapes = (spec.shape for spec in self.specs.values())
        tensors = (tf.ensure_shape(*both) for both in zip(arrays, shapes))
        return dict(zip(self.specs, tensors)), tf.ensure_shape(is_one, ())

    def _next(self, number: np.int64) -> list[Any]:
        newest, iterator = self.newest
        batch = next(iterator, None) if number == newest else None
        if batch is None:
            batch = {name: _nothing(spec) for name, spec in self.specs.items()}
            return [*batch.values(), np.bool_(False)]
        arrays = (
            np.asarray(batch[name], spec.dtype.as_numpy_dtype)
            for name, spec in self.specs.items()
        )
        return [*arrays, np.bool_(True)]


def _nothing(spec: Any) -> np.ndarray:
    shape = [size or 0 for size in spec.shape]
    return np.zeros(shape, spec.dtype.as_numpy_dtype)


def training_dataset(
    read: Callable[[], Iterator[Arrays]], signature: dict[str, tuple[Any, Any]]
) -> Any:
    """Batches of arrays for a step in a graph.

    They end where reading fails: an exception would break off what else the graph that
    asks for them is doing, the update of the batch before. It is collected
    (`collected_errors`) when that batch is asked for, not when it is read ahead.

    Args:
        read: function without arguments that returns an iterator of dicts of arrays.
        signature: dict from their names to `(shape, dtype)`.

    Returns:
        `tf.data.Dataset`.
    """
    import tensorflow as tf

    specs = {name: tf.TensorSpec(*spec) for name, spec in signature.items()}
    failures: list[BaseException] = []

    def batches() -> Iterator[Arrays]:
        iterator = iter(read())
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except BaseException as error:
                failures.append(error)
                nothing = {name: _nothing(spec) for name, spec in specs.items()}
                yield {**nothing, WAS_READ: np.array(False)}
                return
            yield {**batch, WAS_READ: np.array(True)}

    def goes_on(batch: dict[str, Tensor]) -> Tensor:
        ask = functools.partial(_collect_unless, failures)
        was_read = tf.numpy_function(ask, (batch[WAS_READ],), tf.bool)
        return tf.ensure_shape(was_read, ())

    def documents(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in specs}

    flag = {WAS_READ: tf.TensorSpec((), "bool")}
    dataset = dataset_of(batches, {**specs, **flag}).prefetch(1).take_while(goes_on)
    options = tf.data.Options()
    # They would read ahead once more.
    options.experimental_optimization.apply_default_optimizations = False
    # There is nothing to tune, and an iterator that is given up before its end waits
    # for the thread that does, a minute at most.
    options.autotune.enabled = False
    return dataset.map(documents).with_options(options)


# Beside the arrays of a batch.
WAS_READ = "was_read"


def _collect_unless(failures: list[BaseException], was_read: np.bool_) -> np.bool_:
    if not was_read:
        collect(failures.pop())
    return was_read
