"""Whatever `fit` accepts, as a stream of token batches of one fixed shape."""

import itertools
import zlib

import keras
import numpy as np
from keras import ops

# Keras lets a caller bring its own data adapter; its base class is the one part
# of `keras.src` that this library uses.
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.data_adapter_utils import get_torch_dataloader
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

from keras_ebft.backend.runtime import tensorflow_dataset
from keras_ebft.data.row_batches import RowBatches
from keras_ebft.training.token_rows import (
    DTYPES,
    FILLING,
    check_row_fits,
    check_same_keys,
    to_token_rows,
)
from keras_ebft.validation import check_number

DEFAULT_BATCH_SIZE = 16


class TokenBatches(DataAdapter):
    """Token batches of one shape on every backend.

    The first batch decides the shape. Smaller batches are filled up with rows
    that are all padding, shorter ones padded on the right; both count for
    nothing. A fixed shape means one compilation, and TensorFlow needs it.

    Args:
        source: `PyDataset` or iterable of batches of anything
            `to_token_rows` reads, or of tuples `(batch,)`. Its `begin_epoch(epoch)`,
            where it has one, is called before every epoch, with 0 to evaluate.
        causal_lm: the model the batches are for.
        check_rows: function of a dict of rows, raises if they cannot be used.

    Raises:
        ValueError: if there is no batch, if a batch is larger than the first or
            brings targets.
    """

    def __init__(self, source, causal_lm, check_rows):
        self.causal_lm = causal_lm
        self.source = source
        self.keras_adapter = None
        if isinstance(source, keras.utils.PyDataset):
            self.keras_adapter = PyDatasetAdapter(source)
        self._unread = None
        self._batches_to_skip = 0
        self._epoch = 0
        if hasattr(source, "begin_epoch"):
            # An earlier `fit` left it at its last epoch.
            source.begin_epoch(0)
        first = self._read(self._first())
        self._checksum = checksum_of(source, first)
        check_rows(first)
        self.shape = first["token_ids"].shape
        self.signature = {
            name: (values.shape, values.dtype) for name, values in first.items()
        }

    def _first(self):
        if self.keras_adapter is not None:
            return self.source[0]
        iterator = iter(self.source)
        for batch in iterator:
            if iterator is self.source:
                # A generator cannot be started again: hand the batch back.
                self._unread = itertools.chain([batch], iterator)
            return batch
        raise ValueError(
            "Expected at least one batch of documents. Received: an empty "
            f"{type(self.source).__name__}. Check the data set."
        )

    def _read(self, batch):
        if isinstance(batch, tuple):
            if any(part is not None for part in batch[1:]):
                raise ValueError(
                    "Expected batches of documents only, EBFT has no targets or "
                    f"sample weights. Received: a tuple of {len(batch)} parts. "
                    "Yield the documents alone."
                )
            batch = batch[0]
        return to_token_rows(batch, self.causal_lm, trim=False)

    def _fill(self, rows):
        check_same_keys(rows, self.signature)
        filled = {}
        for name, (shape, _) in self.signature.items():
            values = rows[name]
            check_row_fits(values.shape, shape)
            missing = [(0, most - own) for most, own in zip(shape, values.shape)]
            filled[name] = np.pad(values, missing, constant_values=FILLING[name])
        return filled

    def get_numpy_iterator(self):
        """One epoch of batches of arrays."""
        if self.keras_adapter is not None:
            source = self.keras_adapter.get_numpy_iterator()
        else:
            source = self._unread or self.source
            self._unread = None
        start, self._batches_to_skip = self._batches_to_skip, 0
        for batch in itertools.islice(source, start, None):
            yield self._fill(self._read(batch))

    def get_jax_iterator(self):
        """One epoch of batches of arrays, which JAX takes as they are."""
        return self.get_numpy_iterator()

    def get_tf_dataset(self):
        """A `tf.data.Dataset` of batches of static shape."""
        return tensorflow_dataset(self.get_numpy_iterator, self.signature)

    def get_torch_dataloader(self):
        """A torch `DataLoader` of batches of tensors."""
        return get_torch_dataloader(self.get_numpy_iterator())

    @property
    def num_batches(self):
        """Batches per epoch, `None` where the source does not know."""
        if self.keras_adapter is not None:
            return self.keras_adapter.num_batches
        cardinality = getattr(self.source, "cardinality", None)
        if cardinality is not None:
            known = int(cardinality())
            return known if known >= 0 else None
        return len(self.source) if hasattr(self.source, "__len__") else None

    @property
    def batch_size(self):
        """Documents per batch."""
        return self.shape[0]

    @property
    def has_partial_batch(self):
        """Always false: the last batch is filled up."""
        return False

    @property
    def partial_batch_size(self):
        """Always `None`, see `has_partial_batch`."""
        return None

    def record(self):
        """What tells these batches from others: a dict that JSON can hold."""
        shapes = {name: list(shape) for name, (shape, _) in self.signature.items()}
        order = None
        if isinstance(self.source, RowBatches):
            order = {"shuffle": self.source.shuffle, "seed": self.source.seed}
        return {
            "batch shape": shapes,
            "batches": self.num_batches,
            "order": order,
            "checksum": self._checksum,
        }

    def begin_epoch(self, epoch):
        """Notes which epoch comes next, an int; without this it is the first."""
        self._epoch = epoch

    def skip(self, batches):
        """Leaves out the first `batches` batches of the next reading.

        Where the source is read again after its last batch, only the rest counts.
        """
        if self.num_batches:
            batches %= self.num_batches
        self._batches_to_skip = batches

    def on_epoch_begin(self):
        """Tells a source that asks for it which epoch begins."""
        if hasattr(self.source, "begin_epoch"):
            self.source.begin_epoch(self._epoch)
        if self.keras_adapter is not None:
            self.keras_adapter.on_epoch_begin()

    def on_epoch_end(self):
        """Tells a `PyDataset` that an epoch has ended."""
        if self.keras_adapter is not None:
            self.keras_adapter.on_epoch_end()


def token_batches(x, causal_lm, check_rows, batch_size, shuffle, seed):
    """`TokenBatches` of anything `fit` accepts.

    Args:
        x: documents in memory or a stream of batches of them.
        causal_lm: the model the documents are for.
        check_rows: function of a dict of rows, raises if they cannot be used.
        batch_size: int, or `None` for the default; only for data in memory.
        shuffle: bool, for data in memory.
        seed: int, decides the order of shuffled documents.

    Raises:
        ValueError: if a stream comes with a batch size, or there is no document.
    """
    if isinstance(x, TokenBatches):
        return x
    if not _is_stream(x):
        rows = to_token_rows(x, causal_lm)
        if not len(rows["token_ids"]):
            raise ValueError(
                "Expected at least one document. Received: none. Check the data."
            )
        if batch_size is None:
            batch_size = min(DEFAULT_BATCH_SIZE, len(rows["token_ids"]))
        x = RowBatches(rows, batch_size, shuffle, seed)
    elif batch_size is not None:
        raise ValueError(
            f"Expected no `batch_size` for a {type(x).__name__}, which yields whole "
            f"batches itself. Received: batch_size={batch_size}. Leave it out."
        )
    return TokenBatches(x, causal_lm, check_rows)


def checksum_of(source, first):
    """A number that other data do not share.

    Args:
        source: what batches are read from.
        first: its first batch, a dict of arrays.

    Returns:
        int: of all rows where they are in memory, else of the first batch, which is
        what can be read without training on it.
    """
    arrays = source.arrays if isinstance(source, RowBatches) else first
    checksum = 0
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        described = f"{name} {values.dtype.str} {values.shape}".encode()
        checksum = zlib.crc32(described, checksum)
        checksum = zlib.crc32(values.reshape(-1).view("uint8"), checksum)
    return checksum


def split_rows(x, causal_lm, validation_split):
    """Takes the last share of in-memory documents off for validation.

    Args:
        x: documents in memory.
        causal_lm: the model the documents are for.
        validation_split: float in (0, 1).

    Returns:
        `(training rows, validation rows)`, dicts of arrays.

    Raises:
        ValueError: for a stream, or a share that leaves one side empty.
    """
    check_number("validation_split", validation_split, 0.0)
    if _is_stream(x):
        raise ValueError(
            "Expected documents in memory with `validation_split`. Received: a "
            f"{type(x).__name__}. Pass `validation_data` instead."
        )
    rows = to_token_rows(x, causal_lm)
    total = len(rows["token_ids"])
    kept = int(total * (1.0 - validation_split))
    if not 0 < kept < total:
        raise ValueError(
            "Expected `validation_split` to leave documents on both sides. Received: "
            f"validation_split={validation_split} of {total} documents."
        )
    first = {name: values[:kept] for name, values in rows.items()}
    return first, {name: values[kept:] for name, values in rows.items()}


def as_batch(data):
    """The dict that `EBFTModel.call` takes, from what a Keras trainer hands over.

    Args:
        data: a batch from `TokenBatches`, or what `train_on_batch` was given:
            token ids `[B, T]` or a dict, perhaps in a tuple.

    Returns:
        dict of tensors: `token_ids`, `padding_mask` and what else was given.
    """
    if isinstance(data, (tuple, list)):
        data = data[0]
    if not isinstance(data, dict):
        data = {"token_ids": data}
    batch = {
        name: ops.cast(data[name], dtype)
        for name, dtype in DTYPES.items()
        if data.get(name) is not None
    }
    if "padding_mask" not in batch:
        batch["padding_mask"] = (
            batch["segment_ids"] > 0
            if "segment_ids" in batch
            else ops.ones(batch["token_ids"].shape, dtype="bool")
        )
    return batch


def refuse_targets(**given):
    """Raises a `ValueError` for targets and weights, which EBFT does not have."""
    unused = [
        name
        for name in ("y", "sample_weight", "class_weight")
        if given.get(name) is not None
    ]
    if unused:
        raise ValueError(
            "Expected documents alone: EBFT has no targets or sample weights. "
            f"Received: {', '.join(unused)}. Leave them out."
        )


def _is_stream(x):
    if isinstance(x, (str, bytes, list, tuple, dict)) or hasattr(x, "dtype"):
        return False
    return isinstance(x, keras.utils.PyDataset) or hasattr(x, "__iter__")
