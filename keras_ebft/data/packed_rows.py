"""Packed rows in memory and in batches, as every framework likes to read them."""

import math

import keras
import numpy as np

from keras_ebft.validation import check_int


class PackedRows:
    """Packed rows in memory, any of which can be read at any time.

    `len(rows)` and `rows[i]` are all that a `grain.MapDataset.source` or a torch
    `DataLoader` asks for.

    Args:
        arrays: dict of `token_ids`, `padding_mask`, `segment_ids` and
            `answer_mask`, each `[N, length]`; `fit` takes it as it is.
        report: `PackingReport`.

    Example:
    ```python
    rows = keras_ebft.data.pack(texts, tokenizer, length=1024).load()
    model.fit(rows.arrays, batch_size=16)
    model.fit(rows.py_dataset(16, seed=0))
    model.fit(rows.tf_dataset(16))
    model.fit(grain.MapDataset.source(rows).shuffle(seed=0).batch(16))
    ```
    """

    def __init__(self, arrays, report):
        self.arrays = arrays
        self.report = report

    def __len__(self):
        return len(self.arrays["token_ids"])

    def __getitem__(self, index):
        """One row: a dict of arrays `[length]`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        return {name: values[index] for name, values in self.arrays.items()}

    def py_dataset(self, batch_size, shuffle=True, seed=0):
        """Batches as a Keras `PyDataset`.

        Args:
            batch_size: int, rows per batch; the last may be smaller.
            shuffle: bool, another order every epoch.
            seed: int, decides the orders.
        """
        return RowPyDataset(self, batch_size, shuffle, seed)

    def tf_dataset(self, batch_size):
        """Batches, in order, as a `tf.data.Dataset`. Needs TensorFlow."""
        import tensorflow as tf

        batch_size = check_int("batch_size", batch_size, 1)
        return tf.data.Dataset.from_tensor_slices(self.arrays).batch(batch_size)


class RowPyDataset(keras.utils.PyDataset):
    """Batches of `PackedRows`. Made by `PackedRows.py_dataset`."""

    def __init__(self, rows, batch_size, shuffle, seed):
        super().__init__()
        self.rows = rows
        self.rows_per_batch = check_int("batch_size", batch_size, 1)
        self.shuffle = shuffle
        self.random = np.random.default_rng(seed)
        self.order = np.arange(len(rows))

    def __len__(self):
        return math.ceil(len(self.rows) / self.rows_per_batch)

    def __getitem__(self, index):
        """Batch `index`: a dict of arrays `[batch_size, length]`."""
        start = index * self.rows_per_batch
        chosen = self.order[start : start + self.rows_per_batch]
        return {name: values[chosen] for name, values in self.rows.arrays.items()}

    def on_epoch_begin(self):
        """Draws the order of the epoch."""
        if self.shuffle:
            self.order = self.random.permutation(len(self.rows))


class RowBatches:
    """Batches of streamed rows. Made by `PackedStream.batches`.

    Args:
        rows: iterable of dicts of arrays `[length]`.
        batch_size: int.
    """

    def __init__(self, rows, batch_size):
        self.rows = rows
        self.batch_size = batch_size

    def __iter__(self):
        held = []
        for row in self.rows:
            held.append(row)
            if len(held) == self.batch_size:
                yield _stack(held)
                held = []
        if held:
            yield _stack(held)

    def tf_dataset(self):
        """The batches as a `tf.data.Dataset`."""
        import tensorflow as tf

        length = self.rows.length
        types = {
            "token_ids": "int32",
            "padding_mask": "bool",
            "segment_ids": "int32",
            "answer_mask": "bool",
        }
        return tf.data.Dataset.from_generator(
            lambda: iter(self),
            output_signature={
                name: tf.TensorSpec((None, length), dtype)
                for name, dtype in types.items()
            },
        )


def _stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
