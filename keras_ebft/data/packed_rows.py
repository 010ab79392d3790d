"""Packed rows in memory, as every framework likes to read them."""

from typing import Any

from keras_ebft.configurable import Shown
from keras_ebft.data.row_batches import RowBatches, Rows
from keras_ebft.validation import check_int


class PackedRows(Shown):
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

    def __init__(self, arrays: Rows, report: Any) -> None:
        self.arrays = arrays
        self.report = report

    def __len__(self) -> int:
        return len(self.arrays["token_ids"])

    def __getitem__(self, index: int) -> Rows:
        """One row: a dict of arrays `[length]`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        return {name: values[index] for name, values in self.arrays.items()}

    def py_dataset(
        self, batch_size: int, shuffle: bool = True, seed: int = 0
    ) -> RowBatches:
        """Batches as a Keras `PyDataset`.

        Args:
            batch_size: int, rows per batch; the last may be smaller.
            shuffle: bool, another order every epoch.
            seed: int, decides the orders, each together with the epoch's number.
        """
        return RowBatches(self.arrays, batch_size, shuffle, seed, self.report)

    def tf_dataset(self, batch_size: int) -> Any:
        """Batches, in order, as a `tf.data.Dataset`. Needs TensorFlow."""
        import tensorflow as tf

        batch_size = check_int("batch_size", batch_size, 1)
        return tf.data.Dataset.from_tensor_slices(self.arrays).batch(batch_size)
