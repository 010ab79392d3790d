"""Rows in batches: from memory in any order, or as a stream brings them."""

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_ebft.backend.tensorflow_data import dataset_of
from keras_ebft.validation import check_int

# Arrays by name, all of one length.
Rows: TypeAlias = dict[str, np.ndarray]


class RowBatches(keras.utils.PyDataset):
    """Batches of rows held in memory, reshuffled every epoch.

    The order of an epoch follows from the seed and the epoch's number alone, so that
    training that was interrupted sees what it would have seen. `EBFTModel.fit` says
    which epoch it is in (`begin_epoch`); any other trainer of Keras reads the first,
    the second and so on.

    Args:
        arrays: dict of arrays `[N, ...]`.
        batch_size: int, rows per batch; the last may be smaller.
        shuffle: bool, another order every epoch.
        seed: int, decides the orders.
        packing_report: `PackingReport` of rows that were packed, or `None`.

    Raises:
        TypeError: if `batch_size` is not an integer.
        ValueError: if `batch_size` is below 1.
    """

    def __init__(
        self,
        arrays: Rows,
        batch_size: int,
        shuffle: bool,
        seed: int,
        packing_report: Any = None,
    ) -> None:
        super().__init__()
        self.arrays = arrays
        self.packing_report = packing_report
        self.rows_per_batch = check_int("batch_size", batch_size, 1)
        self.shuffle = shuffle
        self.seed = seed
        self.order = np.arange(len(arrays["token_ids"]))
        self.begin_epoch(0)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.rows_per_batch)

    def __getitem__(self, index: int) -> Rows:
        """Batch `index`: a dict of arrays `[batch_size, ...]`."""
        start = index * self.rows_per_batch
        chosen = self.order[start : start + self.rows_per_batch]
        return {name: values[chosen] for name, values in self.arrays.items()}

    def begin_epoch(self, epoch: int) -> None:
        """Draws the order of an epoch, the same whenever training comes to it."""
        self.epoch = epoch
        if self.shuffle:
            random = np.random.default_rng(self.seed)
            for _ in range(epoch + 1):
                self.order = random.permutation(len(self.order))

    def on_epoch_end(self) -> None:
        """Goes on to the next epoch, for trainers that say no number."""
        self.begin_epoch(self.epoch + 1)


class StreamBatches:
    """Batches of streamed rows. Made by `PackedStream.batches`.

    Args:
        rows: iterable of dicts of arrays `[length]`.
        batch_size: int, rows per batch; the last may be smaller.
    """

    def __init__(self, rows: Any, batch_size: int) -> None:
        self.rows = rows
        self.batch_size = check_int("batch_size", batch_size, 1)

    @property
    def packing_report(self) -> Any:
        """`PackingReport` of the newest pass, `None` of rows that were not packed."""
        return getattr(self.rows, "report", None)

    def __iter__(self) -> Iterator[Rows]:
        held = []
        for row in self.rows:
            held.append(row)
            if len(held) == self.batch_size:
                yield _stack(held)
                held = []
        if held:
            yield _stack(held)

    def tf_dataset(self) -> Any:
        """The batches as a `tf.data.Dataset`."""
        import tensorflow as tf

        length = self.rows.length
        types = {
            "token_ids": "int32",
            "padding_mask": "bool",
            "segment_ids": "int32",
            "answer_mask": "bool",
        }
        specs = {
            name: tf.TensorSpec((None, length), dtype) for name, dtype in types.items()
        }
        return dataset_of(lambda: iter(self), specs)


def _stack(rows: list[Rows]) -> Rows:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
