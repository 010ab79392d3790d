"""Whatever `fit` accepts, as `TokenBatches`."""

import keras

from keras_ebft.backend.replicas import num_processes
from keras_ebft.data import (
    PackedRows,
    PackedStream,
    ProcessShare,
    RecordDocuments,
)
from keras_ebft.data.columns import columns_of
from keras_ebft.data.row_batches import RowBatches
from keras_ebft.data.tables import is_table
from keras_ebft.training.batches import TokenBatches
from keras_ebft.training.data_report import DataReport, Losses
from keras_ebft.training.process_batches import ProcessBatches, rows_of_each
from keras_ebft.training.texts import is_sequence
from keras_ebft.validation import check_number

DEFAULT_BATCH_SIZE = 16


def token_batches(x, reader, batch_size, shuffle, seed, report=None):
    """`TokenBatches` of anything `fit` accepts.

    Args:
        x: documents in memory or a stream of batches of them.
        reader: `Reader` of the model the documents are for.
        batch_size: int, or `None` for the default; only for data in memory.
        shuffle: bool, for data in memory.
        seed: int, decides the order of shuffled documents.
        report: `DataReport` to fill, by default one of its own.

    Raises:
        ValueError: if a stream comes with a batch size, there is no document, or
            nothing of documents in memory counts.
    """
    if isinstance(x, TokenBatches):
        return x
    kind = TokenBatches
    if isinstance(x, ProcessShare):
        x = x.documents
        if num_processes() > 1:
            kind, batch_size = ProcessBatches, _own_batch_size(x, batch_size)
    report = DataReport() if report is None else report
    _refuse_single_documents(x)
    if isinstance(x, PackedStream):
        x = x.batches(batch_size or DEFAULT_BATCH_SIZE)
    elif not _is_stream(x):
        rows = reader.read(x, report)
        reader.count_all(rows, report)
        if batch_size is None:
            batch_size = min(DEFAULT_BATCH_SIZE, len(rows["token_ids"]))
        x = RowBatches(rows, batch_size, shuffle, seed)
    elif batch_size is not None:
        raise ValueError(
            f"Expected no `batch_size` for a {type(x).__name__}, which yields whole "
            f"batches itself. Received: batch_size={batch_size}. Leave it out."
        )
    return kind(x, reader, report)


def batches_itself(x):
    """Whether data is a stream of batches, whose size nobody can ask for."""
    x = x.documents if isinstance(x, ProcessShare) else x
    return _is_stream(x) and not isinstance(x, (TokenBatches, PackedStream))


def refuse_used_up(training, validation, options):
    """Raises a `ValueError` for what is read once, but asked for again in every epoch.

    Keras would go on without a step.

    Args:
        training: `TokenBatches`.
        validation: `TokenBatches` or `None`.
        options: dict, further arguments of `fit`.
    """
    epochs = (options.get("epochs") or 1) - (options.get("initial_epoch") or 0)
    for name, batches, per_epoch in (
        ("x", training, "steps_per_epoch"),
        ("validation_data", validation, "validation_steps"),
    ):
        source = getattr(batches, "source", None)
        if epochs <= 1 or options.get(per_epoch) or not hasattr(source, "__next__"):
            continue
        raise ValueError(
            f"Expected `{name}` that can be read again in every epoch. Received: a "
            f"{type(source).__name__}, which the first of {epochs} epochs uses up. "
            "Pass documents in memory, a PyDataset or keras_ebft.data.pack(...); or "
            f"`{per_epoch}` with a generator that goes on."
        )


def _own_batch_size(x, batch_size):
    """The rows of a batch that come from this process; `None` of a stream's own."""
    if batch_size is not None:
        return rows_of_each(batch_size)
    if batches_itself(x):
        return None
    return max(DEFAULT_BATCH_SIZE // num_processes(), 1)


def split_rows(x, reader, validation_split, report=None):
    """Takes the last share of in-memory documents off for validation.

    Args:
        x: documents in memory.
        reader: `Reader` of the model the documents are for.
        validation_split: float in (0, 1).
        report: `DataReport` that counts what of the training rows' documents is in
            no row, and what `pack` left out of all of them; or `None`.

    Returns:
        `(training rows, validation rows)`, dicts of arrays.

    Raises:
        ValueError: for a stream, or a share that leaves one side empty.
    """
    check_number("validation_split", validation_split, 0.0, 1.0)
    if isinstance(x, ProcessShare):
        parts = split_rows(x.documents, reader, validation_split, report)
        return tuple(map(ProcessShare, parts))
    if _is_stream(x):
        raise ValueError(
            "Expected documents in memory with `validation_split`. Received: a "
            f"{type(x).__name__}. Pass `validation_data` instead."
        )
    losses = Losses()
    rows = reader.read(x, losses)
    total = len(rows["token_ids"])
    kept = int(total * (1.0 - validation_split))
    if not 0 < kept < total:
        raise ValueError(
            "Expected `validation_split` to leave documents on both sides. Received: "
            f"validation_split={validation_split} of {total} documents."
        )
    if report is not None:
        losses.of_first(kept, report)
    first = {name: values[:kept] for name, values in rows.items()}
    return first, {name: values[kept:] for name, values in rows.items()}


def _refuse_single_documents(x):
    """Raises a `TypeError` for a stream that yields one document after the other."""
    is_table = columns_of(x) is not None and not hasattr(x, "__len__")
    if is_table or (isinstance(x, RecordDocuments) and not is_sequence(x)):
        raise TypeError(
            "Expected documents in memory, or a stream of batches. Received: a "
            f"{type(x).__name__}, which yields one document after the other. Pass "
            "keras_ebft.data.pack(documents, tokenizer, length), which makes rows of "
            "them; or list(documents), if they fit into memory."
        )


def _is_stream(x):
    in_memory = (str, bytes, list, tuple, dict, PackedRows)
    if isinstance(x, in_memory) or hasattr(x, "dtype") or is_table(x):
        return False
    if isinstance(x, keras.utils.PyDataset):
        return True
    return hasattr(x, "__iter__") and not is_sequence(x)
