"""`pack`: a stream of documents as a stream of full rows, in constant memory."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_ebft.configurable import Shown
from keras_ebft.data.bin_packing import STRATEGIES
from keras_ebft.data.documents import DocumentTokenizer, every_nth
from keras_ebft.data.packed_rows import PackedRows
from keras_ebft.data.row_batches import Rows, StreamBatches
from keras_ebft.data.tables import as_documents
from keras_ebft.data.token_window import TokenWindow
from keras_ebft.validation import check_bool, check_choice, check_int

LONG_DOCUMENTS = ("split", "drop")
# Rows that are laid out at a time.
ROWS_PER_BLOCK = 256


@dataclasses.dataclass
class PackingReport:
    """What has become of the documents read so far.

    Attributes:
        length: int, tokens per row.
        documents: int, documents read.
        empty_documents: int, left out because they, or their answers, had no token.
        dropped_documents: int, left out because they were longer than a row.
        dropped_tokens: int, tokens of those.
        split_documents: int, cut into pieces: those longer than a row, of a stream
            all that rows end within.
        tokens: int, tokens in the rows, start and end tokens included.
        rows: int.
    """

    length: int
    documents: int = 0
    empty_documents: int = 0
    dropped_documents: int = 0
    dropped_tokens: int = 0
    split_documents: int = 0
    tokens: int = 0
    rows: int = 0

    @property
    def fill_rate(self) -> float:
        """Share of the rows' places that hold a token, 0 without rows."""
        return self.tokens / (self.rows * self.length) if self.rows else 0.0

    def __str__(self) -> str:
        return (
            f"{self.documents} documents in {self.rows} rows of {self.length}: "
            f"{self.tokens} tokens, fill rate {self.fill_rate:.1%}; "
            f"{self.split_documents} split, {self.dropped_documents} too long and "
            f"dropped ({self.dropped_tokens} tokens), {self.empty_documents} empty"
        )


def pack(
    documents: Any,
    tokenizer: Any,
    length: int,
    *,
    strategy: str = "best_fit",
    long_documents: str = "split",
    special_tokens: bool = True,
    shard: tuple[int, int] = (0, 1),
    window_rows: int = 1024,
) -> "PackedStream":
    """Packs documents of any length into rows of one length.

    Several documents share a row; `segment_ids` tells them apart, and `fit` keeps
    them apart: attention and positions restart at each, but for `"stream"`. Every
    token of every document is in exactly one row, except what the report counts as
    dropped.

    Args:
        documents: list, array, data set or other iterable that can be read again
            and again, or a function that returns an iterator; a DataFrame, a
            `datasets.Dataset` or a `pathlib.Path` with a column `text`, or `prompt`
            and `answer` (see `from_records` and `from_path`). A document is a
            string (or UTF-8 bytes), a pair (tuple) of prompt and answer, or an
            int array of token ids in place of a string.
        tokenizer: `keras_hub` tokenizer, or a function from a list of strings to
            a list of lists of ids. `None` for documents that are token ids.
        length: int, tokens per row.
        strategy: `"best_fit"` fills rows best. `"in_order"` keeps documents in
            their order. `"stream"` makes one text of all documents and cuts it
            where rows end, as the authors of EBFT do: each row is one segment,
            attention and positions run on from document to document, and end
            tokens are all that tells them apart.
        long_documents: what happens to a document of more than `length` tokens:
            `"split"` cuts it into pieces, each a segment of its own; `"drop"`
            leaves it out and counts it.
        special_tokens: bool, whether the tokenizer's start token goes before and
            its end token after each document, where it has them.
        shard: `(index, count)`: take documents `index`, `index + count`, ... only,
            so that each of `count` processes packs its own.
        window_rows: int, how many rows' worth of tokens are packed together.
            Memory holds one window, or one document where that is longer.

    Returns:
        `PackedStream`.

    Raises:
        TypeError: if an argument has the wrong type, or documents are no sequence.
        ValueError: if a value is out of range or unknown, or documents can be read
            once only. While reading: for a document that cannot be used, or if
            there was none with a token.

    Example:
    >>> stream = pack(["abc", "de", "fgh"], lambda texts: [
    ...     [ord(c) - 96 for c in text] for text in texts], length=6)
    >>> row = next(iter(stream))
    >>> row["token_ids"]
    array([1, 2, 3, 6, 7, 8], dtype=int32)
    >>> row["segment_ids"]
    array([1, 1, 1, 2, 2, 2], dtype=int32)
    >>> print(stream.load().report)
    3 documents in 2 rows of 6: 8 tokens, fill rate 66.7%; 0 split, 0 too long and \
dropped (0 tokens), 0 empty
    """
    check_choice("strategy", strategy, list(STRATEGIES))
    check_choice("long_documents", long_documents, LONG_DOCUMENTS)
    if (strategy, long_documents) == ("stream", "drop"):
        raise ValueError(
            'Expected long_documents="split" with strategy="stream", which cuts '
            'documents of any length. Received: long_documents="drop". Leave it out, '
            "or use another strategy."
        )
    return PackedStream(
        _check_documents(documents),
        DocumentTokenizer(tokenizer, check_bool("special_tokens", special_tokens)),
        check_int("length", length, 1),
        strategy=strategy,
        split_long=long_documents == "split",
        shard=_check_shard(shard),
        window_rows=check_int("window_rows", window_rows, 1),
    )


class PackedStream(Shown):
    """Packed rows of documents that are read as they are needed. Made by `pack`.

    Iterating yields one row at a time: a dict of `token_ids` int32,
    `padding_mask` bool, `segment_ids` int32 (1, 2, ... and 0 for padding) and
    `answer_mask` bool (all tokens of a plain text), each `[length]`. The same
    documents give the same rows in the same order.

    Attributes:
        report: `PackingReport` of the newest pass over the documents.
    """

    def __init__(
        self,
        documents: Any,
        tokenize: DocumentTokenizer,
        length: int,
        *,
        strategy: str,
        split_long: bool,
        shard: tuple[int, int],
        window_rows: int,
    ) -> None:
        self.length = length
        self.report = PackingReport(length)
        self._documents = documents
        self._tokenize = tokenize
        self._strategy = strategy
        self._split_long = split_long
        self._shard = shard
        self._window_rows = window_rows
        self._start = self._position = _position(0, 0)

    def _shown_settings(self) -> dict[str, Any]:
        return {
            "documents": self._documents,
            "tokenizer": self._tokenize.tokenizer,
            "length": self.length,
            "strategy": self._strategy,
            "long_documents": "split" if self._split_long else "drop",
            "shard": self._shard,
            "window_rows": self._window_rows,
        }

    def __iter__(self) -> Iterator[Rows]:
        for block in self.blocks():
            for row in range(len(block["token_ids"])):
                self._position = {
                    **self._position,
                    "rows": self._position["rows"] + 1,
                }
                yield {name: values[row] for name, values in block.items()}

    def blocks(self) -> Iterator[Rows]:
        """Yields many rows at a time: dicts of arrays `[R, length]`, R varying."""
        self.report = report = PackingReport(self.length)
        start = self._start
        first = start["rows"]
        for documents_before, window in self._windows(start["documents"], report):
            self._position = _position(documents_before, first)
            while first < window.num_rows:
                last = min(first + ROWS_PER_BLOCK, window.num_rows)
                block = window.rows(first, last)
                report.rows += last - first
                report.tokens += int(np.count_nonzero(block["padding_mask"]))
                yield block
                first = last
            first = 0
        self._start = _position(0, 0)
        if not report.rows and start == self._start:
            raise ValueError(
                "Expected at least one document with a token. Received: "
                f"{report.documents} documents, of which {report.empty_documents} "
                f"empty and {report.dropped_documents} too long. Check the data set "
                "and its split."
            )

    def batches(self, batch_size: int) -> StreamBatches:
        """Batches of rows that `fit` takes, read anew every epoch.

        Args:
            batch_size: int, rows per batch; the last may be smaller.

        Returns:
            iterable of dicts of arrays `[batch_size, length]`.
        """
        return StreamBatches(self, batch_size)

    def tf_dataset(self, batch_size: int) -> Any:
        """The same batches as a `tf.data.Dataset`. Needs TensorFlow."""
        return self.batches(batch_size).tf_dataset()

    def load(self) -> PackedRows:
        """Reads everything into memory.

        Returns:
            `PackedRows`.
        """
        blocks = list(self.blocks())
        rows = {
            name: np.concatenate([block[name] for block in blocks])
            for name in blocks[0]
        }
        return PackedRows(rows, self.report)

    def get_state(self) -> dict[str, int]:
        """Position after the last row that was handed out, as a dict of ints.

        A batch counts as handed out when it is made: what a prefetching consumer
        holds back is not read again.
        """
        return dict(self._position)

    def set_state(self, state: dict[str, int]) -> None:
        """Makes the next pass begin where `get_state` was called.

        The pass after it begins with the first document again. The documents and
        all settings must be the same.

        Args:
            state: dict from `get_state`.

        Raises:
            ValueError: if it is something else.
        """
        if not isinstance(state, dict) or set(state) != {"documents", "rows"}:
            raise ValueError(
                "Expected a state from get_state(), a dict of 'documents' and "
                f"'rows'. Received: {state!r}."
            )
        self._start = self._position = _position(
            check_int("documents", state["documents"], 0),
            check_int("rows", state["rows"], 0),
        )

    def _windows(
        self, done: int, report: PackingReport
    ) -> Iterator[tuple[int, TokenWindow]]:
        """Yields `(documents read before the window, TokenWindow)`."""
        documents = every_nth(self._documents, *self._shard, done)
        enough = self._window_rows * self.length
        held, tokens, before = [], 0, done
        for document in self._tokenize(documents):
            report.documents += 1
            if self._keep(document, report):
                held.append(document)
                tokens += len(document[0])
            if tokens >= enough:
                yield before, self._window(held, report)
                held, tokens, before = [], 0, done + report.documents
        if held:
            yield before, self._window(held, report)

    def _window(self, documents: list[Any], report: PackingReport) -> TokenWindow:
        window = TokenWindow(
            documents,
            self.length,
            STRATEGIES[self._strategy],
            joined=self._strategy == "stream",
        )
        report.split_documents += window.num_split
        return window

    def _keep(self, document: Any, report: PackingReport) -> bool:
        if document is None:
            report.empty_documents += 1
            return False
        if len(document[0]) > self.length and not self._split_long:
            report.dropped_documents += 1
            report.dropped_tokens += len(document[0])
            return False
        return True


def _position(documents: int, rows: int) -> dict[str, int]:
    return {"documents": documents, "rows": rows}


def _check_documents(documents: Any) -> Any:
    documents = as_documents(documents)
    if isinstance(documents, (str, bytes, dict)):
        raise TypeError(
            "Expected several documents. Received: one "
            f"{type(documents).__name__}. Pass a list, or a pathlib.Path of a file."
        )
    if callable(documents):
        return documents
    is_one = getattr(documents, "shape", None) == ()
    is_several = hasattr(documents, "__iter__") or hasattr(documents, "__getitem__")
    if is_one or not is_several:
        raise TypeError(
            "Expected documents to be iterable. Received: "
            f"{type(documents).__name__}. Pass a list."
        )
    if hasattr(documents, "__next__"):
        raise ValueError(
            "Expected documents that can be read once per epoch. Received: a "
            f"{type(documents).__name__}, which is used up by the first. Pass a "
            "list, or a function that returns a new iterator."
        )
    return documents


def _check_shard(shard: Any) -> tuple[int, int]:
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise ValueError(
            f"Expected `shard` to be (index, count). Received: shard={shard!r}. "
            "Pass for example shard=(0, 2)."
        )
    count = check_int("shard count", shard[1], 1)
    index = check_int("shard index", shard[0], 0)
    if index >= count:
        raise ValueError(
            f"Expected a shard index below the count. Received: shard={shard!r}. "
            "Indices count from 0."
        )
    return index, count
