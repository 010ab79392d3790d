"""A stream of token batches of one fixed shape, out of batches of any documents."""

import itertools
import threading
import weakref
import zlib
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

# Keras lets a caller bring its own data adapter; its base class is the one part
# of `keras.src` that this library uses.
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.data_adapter_utils import get_torch_dataloader
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

from keras_ebft.backend.distribution import refuse_silent_distribution
from keras_ebft.backend.replicas import (
    num_shares,
    rows_of_process,
)
from keras_ebft.backend.tensorflow_data import training_dataset
from keras_ebft.data.row_batches import RowBatches
from keras_ebft.training.token_rows import (
    DTYPES,
    FILLING,
    check_row_fits,
    check_same_keys,
    to_token_rows,
)

# Rows whose blocks are counted at a time.
ROWS_PER_COUNT = 1024


class Reader(NamedTuple):
    """The door for data of one model: every way in goes through it.

    Attributes:
        causal_lm: the `CausalLM` the documents are for.
        check_rows: function of a dict of rows, raises if they cannot be used.
        live_blocks: function of a dict of rows, int array `[N]` of their live
            blocks, or `None` where a model has none.
    """

    causal_lm: Any
    check_rows: Any
    live_blocks: Any

    def read(self, x, report=None, trim=True, check=True):
        """Documents in memory as checked rows.

        Args:
            x: what `to_token_rows` reads.
            report: `DataReport` that counts them, or `None`.
            trim: bool, see `to_token_rows`.
            check: bool, whether the rows must hold what the sampler asks for; a
                later batch may be shorter than the first, and is filled up.

        Returns:
            dict of arrays.

        Raises:
            TypeError, ValueError: for documents that cannot be used.
        """
        refuse_silent_distribution()
        rows = to_token_rows(x, self.causal_lm, trim, report)
        if not len(rows["token_ids"]):
            raise ValueError(
                "Expected at least one document. Received: none. Check the data."
            )
        if check:
            self.check_rows(rows)
        return rows

    def count_all(self, rows, report):
        """Counts the blocks of rows, and raises a `ValueError` if nothing counts."""
        for start in range(0, len(rows["token_ids"]), ROWS_PER_COUNT):
            part = {
                name: values[start : start + ROWS_PER_COUNT]
                for name, values in rows.items()
            }
            report.count_blocks(part, self.live_blocks(part))
        report.complete = True
        report.check_counts()


class _WholeBatches(PyDatasetAdapter):
    """Batches of a `PyDataset`, of which Keras would make a list a tuple of parts."""

    def _standardize_batch(self, batch):
        batch = (batch,) if isinstance(batch, list) else batch
        return super()._standardize_batch(batch)


class _Standing:
    """At which pass a source stands, for all who read it.

    Attributes:
        number: int, that of the pass it was told last; `None` where it has moved on.
        lock: held while it is told or read; some backends read ahead in a thread.
    """

    def __init__(self):
        self.number = None
        self.lock = threading.Lock()


# By the identity of the source, while it is read.
_STANDINGS = weakref.WeakValueDictionary()


class TokenBatches(DataAdapter):
    """Token batches of one shape on every backend.

    The first batch decides the shape. Smaller batches are filled up with rows
    that are all padding, shorter ones padded on the right; both count for
    nothing. A fixed shape means one compilation, and TensorFlow needs it.

    Every process reads whole batches, and hands on its share of the rows.

    Args:
        source: `PyDataset` or iterable of batches of anything
            `to_token_rows` reads, or of tuples `(batch,)`. Its `begin_epoch(epoch)`,
            where it has one, is called before every epoch, with 0 to evaluate.
        reader: `Reader` of the model the batches are for.
        report: `DataReport` that counts what is read until it is complete.

    Raises:
        ValueError: if there is no batch, if a batch is larger than the first, or
            brings targets.
    """

    def __init__(self, source, reader, report):
        self.reader = reader
        self.report = report
        self.source = source
        self.keras_adapter = None
        if isinstance(source, keras.utils.PyDataset):
            self.keras_adapter = _WholeBatches(source)
        # What `StepTimer` asks for.
        self.tokens_read = self.batches_read = 0
        # Whether passes follow one another without an end.
        self.endless = False
        self._unread = None
        self._batches_to_skip = 0
        self._epoch = 0
        self._standing = _STANDINGS.setdefault(id(source), _Standing())
        # An earlier `fit` left it at its last pass.
        self._tell_pass()
        first = self._read(self._first(), check=True)
        self._checksum = checksum_of(source, first)
        self.signature = self._signature_of(first)
        self.shape = self.signature["token_ids"][0]

    def _signature_of(self, first):
        """`(shape, dtype)` of what each batch that is read is filled up to."""
        return {name: (values.shape, values.dtype) for name, values in first.items()}

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

    def _read(self, batch, report=None, check=False):
        if isinstance(batch, tuple):
            if any(part is not None for part in batch[1:]):
                raise ValueError(
                    "Expected batches of documents only, EBFT has no targets or "
                    f"sample weights. Received: a tuple of {len(batch)} parts. "
                    "Yield the documents alone."
                )
            batch = batch[0]
        elif _is_collated_array(batch):
            batch = batch[0]
        _refuse_collated(batch, self.source)
        return self.reader.read(batch, report, trim=False, check=check)

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
        """One epoch of batches of arrays; all that follow too, if it is endless."""
        start, self._batches_to_skip = self._batches_to_skip, 0
        if self.endless:
            yield from self._passes(start)
            return
        for batch in itertools.islice(self._one_pass(), start, None):
            yield self._counted(batch)

    def _one_pass(self):
        if self.keras_adapter is not None:
            found = self.keras_adapter.get_numpy_iterator()
        else:
            found, self._unread = self._unread or self.source, None
        return self._told(found) if hasattr(self.source, "begin_epoch") else found

    def _told(self, batches):
        """Batches of one pass, also where others read the source meanwhile.

        Validation on the data that is trained on, for example, in the middle of a pass.
        """
        iterator = iter(batches)
        while True:
            with self._standing.lock:
                if self._standing.number != self._epoch:
                    self._tell_pass()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def _passes(self, start):
        """Whole passes over the data, however many of them make up an epoch.

        An order holds for a pass: one that changed within it would show some
        documents twice and others never.
        """
        done, start = divmod(start, self.batches_per_pass or start + 1)
        self._epoch += done
        empty = False
        while not empty:
            self._begin_pass()
            empty = True
            for batch in self._one_pass():
                empty = False
                if start:
                    start -= 1
                else:
                    yield self._counted(batch)
            self._end_pass()
            self._epoch += 1
            if hasattr(self.source, "__next__"):
                # It is used up.
                return

    def _tell_pass(self):
        if hasattr(self.source, "begin_epoch"):
            self.source.begin_epoch(self._epoch)
        self._standing.number = self._epoch

    def _begin_pass(self):
        with self._standing.lock:
            self._tell_pass()
            if self.keras_adapter is not None:
                self.keras_adapter.on_epoch_begin()

    def _end_pass(self):
        with self._standing.lock:
            if self.keras_adapter is not None:
                self.keras_adapter.on_epoch_end()
            self._standing.number = None

    def _counted(self, batch):
        complete = self.report.complete
        filled = self._fill(self._read(batch, None if complete else self.report))
        if not complete:
            self.report.count_blocks(filled, self.reader.live_blocks(filled))
        self.tokens_read += int(np.count_nonzero(filled["padding_mask"]))
        self.batches_read += 1
        return self._share_of(filled)

    def _share_of(self, filled):
        """What of a batch this process computes with."""
        return share_of(filled)

    def get_jax_iterator(self):
        """One epoch of batches of arrays, which JAX takes as they are."""
        return self.get_numpy_iterator()

    def get_tf_dataset(self):
        """A `tf.data.Dataset` of batches of static shape."""
        empty = {name: np.empty(*of) for name, of in self.signature.items()}
        share = self._share_of(empty)
        signature = {name: (rows.shape, rows.dtype) for name, rows in share.items()}
        return training_dataset(self.get_numpy_iterator, signature)

    def get_torch_dataloader(self):
        """A torch `DataLoader` of batches of tensors."""
        return get_torch_dataloader(self.get_numpy_iterator())

    @property
    def num_batches(self):
        """Batches per epoch, `None` where there is no end or the source is unsure."""
        return None if self.endless else self.batches_per_pass

    @property
    def batches_per_pass(self):
        """Batches of all the data, `None` where the source does not know."""
        if self.keras_adapter is not None:
            return self.keras_adapter.num_batches
        cardinality = getattr(self.source, "cardinality", None)
        if cardinality is not None:
            known = int(cardinality())
            return known if known >= 0 else None
        return len(self.source) if hasattr(self.source, "__len__") else None

    @property
    def batch_size(self):
        """Documents per batch, of all processes together."""
        return self.shape[0]

    @property
    def has_partial_batch(self):
        """Always false: the last batch is filled up."""
        return False

    @property
    def partial_batch_size(self):
        """Always `None`, see `has_partial_batch`."""
        return None

    @property
    def packing_report(self):
        """What `pack` did in the newest pass; `None` where an epoch is none."""
        return None if self.endless else getattr(self.source, "packing_report", None)

    def check_end(self):
        """Raises a `ValueError` where processes could end at unlike steps."""

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
        """Notes the number of the pass that comes next; without this it is 0."""
        self._epoch = epoch

    def skip(self, batches):
        """Leaves out the first `batches` batches of the next reading."""
        self._batches_to_skip = batches

    def on_epoch_begin(self):
        """Tells a source that asks for it which epoch begins."""
        if not self.endless:
            self._begin_pass()

    def on_epoch_end(self):
        """Tells a `PyDataset` that an epoch has ended."""
        if not self.endless:
            self._end_pass()


def share_of(rows):
    """The rows of a batch that this process computes with.

    Args:
        rows: dict of arrays `[B, ...]`, the same in every process.

    Returns:
        dict of arrays `[b, ...]`. Where the devices do not divide B, rows that are
        all padding fill the batch up; they count for nothing.
    """
    filled = filled_up(rows, num_shares())
    return {name: rows_of_process(values) for name, values in filled.items()}


def filled_up(rows, devices):
    """Rows that devices divide: some that are all padding come after the last.

    Args:
        rows: dict of arrays `[B, ...]`.
        devices: int.
    """
    missing = -len(rows["token_ids"]) % devices
    if not missing:
        return rows
    return {
        name: np.pad(
            values,
            [(0, missing)] + [(0, 0)] * (values.ndim - 1),
            constant_values=FILLING[name],
        )
        for name, values in rows.items()
    }


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


def as_batch(data):
    """The dict that `EBFTModel.call` takes, from what a Keras trainer hands over.

    Args:
        data: a batch from `TokenBatches`, or what `train_on_batch` was given:
            token ids `[B, T]` or a dict, perhaps in a tuple.

    Returns:
        dict of tensors: `token_ids`, `padding_mask` and what else was given.

    Raises:
        TypeError: for documents that nothing has read yet, such as strings.
    """
    if isinstance(data, (tuple, list)) and len(data):
        data = data[0]
    if not isinstance(data, dict):
        data = {"token_ids": data}
    kind = getattr(data.get("token_ids"), "dtype", None)
    if kind is None or "int" not in str(kind):
        raise TypeError(
            "Expected a batch of token ids: an integer array [B, T], or a dict with "
            f"'token_ids'. Received: {_shown(data)}. Pass documents of other forms, "
            "such as strings and lists, to `loss_terms`, `evaluate` or `fit`, which "
            "read them."
        )
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


def _shown(data):
    ids = data.get("token_ids")
    if ids is None:
        return f"a dict with {sorted(map(str, data))}"
    dtype = getattr(ids, "dtype", None)
    return f"a {type(ids).__name__}" + (f" of {dtype}" if dtype is not None else "")


def _is_collated_array(batch):
    """Whether a batch is a list `[rows]`, as torch collates a `TensorDataset`."""
    if not (isinstance(batch, list) and len(batch) == 1):
        return False
    # A pair of lists of ids is a document.
    return hasattr(batch[0], "dtype") and len(batch[0].shape) == 2


def _refuse_collated(batch, source):
    """Raises a `ValueError` for pairs that a `DataLoader` has taken apart."""
    collate = getattr(getattr(source, "collate_fn", None), "__name__", None)
    apart = isinstance(batch, list) and len(batch) > 1 and isinstance(batch[0], tuple)
    if collate == "default_collate" and apart:
        raise ValueError(
            "Expected batches that are lists of documents. Received: a DataLoader "
            "that puts all prompts into one tuple and all answers into another. "
            "Build it with collate_fn=list."
        )
