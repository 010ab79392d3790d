"""What has become of the documents that `fit` was given, and that it is said."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_ebft.data.packing import PackingReport
from keras_ebft.data.row_batches import Rows

logger = logging.getLogger("keras_ebft")


@dataclasses.dataclass
class DataReport:
    """Counts of one pass over the data.

    Attributes:
        rows: int.
        documents: int, with tokens; packed ones one by one.
        empty_rows: int, without a token.
        tokens: int, tokens in the rows.
        cut_documents: int, longer than a row may be.
        dropped_tokens: int, tokens of these that have no place.
        unpacked_documents: int, longer than a row and left out by `pack`.
        unpacked_tokens: int, tokens of these.
        empty_documents: int, left out by `pack`, because there is nothing in them.
        split_documents: int, longer than a row and cut into pieces by `pack`.
        counted_tokens: int, next tokens that the cross-entropy counts.
        live_blocks: int or `None`, blocks that live; `None` where there are none.
        rows_without_block: int, rows with tokens in which none lives.
        complete: bool, whether the pass is over.
    """

    rows: int = 0
    documents: int = 0
    empty_rows: int = 0
    tokens: int = 0
    cut_documents: int = 0
    dropped_tokens: int = 0
    unpacked_documents: int = 0
    unpacked_tokens: int = 0
    empty_documents: int = 0
    split_documents: int = 0
    counted_tokens: int = 0
    live_blocks: int | None = None
    rows_without_block: int = 0
    complete: bool = False

    def count(self, rows: Rows, lost: np.ndarray | None = None) -> None:
        """Adds rows as `to_token_rows` returns them.

        Args:
            rows: dict of arrays `[N, T]`.
            lost: int array `[N]`, tokens that had no place, or `None`.
        """
        mask = rows["padding_mask"]
        segments = rows.get("segment_ids", mask.astype("int32"))
        same = segments[:, 1:] == segments[:, :-1]
        begins = mask.copy()
        begins[:, 1:] &= ~same
        self.rows += len(mask)
        self.documents += int(np.count_nonzero(begins))
        self.empty_rows += int(np.count_nonzero(~mask.any(axis=1)))
        self.tokens += int(np.count_nonzero(mask))
        counted = mask[:, 1:] & same & rows.get("answer_mask", mask)[:, 1:]
        self.counted_tokens += int(np.count_nonzero(counted))
        if lost is not None:
            self.count_lost(lost)

    def count_lost(self, lost: np.ndarray) -> None:
        """Adds the tokens `[N]` of documents that had no place."""
        self.cut_documents += int(np.count_nonzero(lost))
        self.dropped_tokens += int(lost.sum())

    def count_packing(self, packing: PackingReport) -> None:
        """Takes over what `pack` did, which the rows of a whole pass do not say.

        Args:
            packing: `PackingReport` of the pass.
        """
        self.count_left_out(packing)
        # Rows count the pieces of a document that was split.
        left_out = packing.dropped_documents + packing.empty_documents
        self.documents = packing.documents - left_out

    def count_left_out(self, packing: PackingReport) -> None:
        """Takes over what `pack` left out and split alone."""
        self.unpacked_documents += packing.dropped_documents
        self.unpacked_tokens += packing.dropped_tokens
        self.empty_documents += packing.empty_documents
        self.split_documents += packing.split_documents

    def count_blocks(self, rows: Rows, live: np.ndarray | None) -> None:
        """Adds the live blocks `[N]` of rows; `None` of a model without blocks."""
        if live is None:
            return
        self.live_blocks = (self.live_blocks or 0) + int(live.sum())
        real = rows["padding_mask"].any(axis=1)
        self.rows_without_block += int(np.count_nonzero(real & (live == 0)))

    @property
    def loses(self) -> bool:
        """Whether anything that was given counts for nothing."""
        return bool(
            self.empty_rows
            or self.dropped_tokens
            or self.unpacked_documents
            or self.empty_documents
            or self.rows_without_block
        )

    def check_counts(self) -> None:
        """Raises a `ValueError` if nothing of all that was read counts."""
        if self.live_blocks is None and not self.counted_tokens:
            raise ValueError(
                "Expected at least one token that follows another of its document and, "
                f"with an answer mask, is an answer. Received: {self}. Check the "
                "documents and their answers."
            )
        if self.live_blocks == 0:
            raise ValueError(
                "Expected documents that hold at least one block: `context_length` "
                "tokens and then `rollout_length` tokens of one document, of which at "
                f"least one counts. Received: {self}. Use longer documents, a sampler "
                "with a shorter `context_length` or `rollout_length`, or check the "
                "answers and anchors."
            )

    def __str__(self) -> str:
        parts = [
            f"{self.documents} documents in {self.rows} rows",
            f"{self.tokens} tokens",
        ]
        if self.dropped_tokens:
            parts.append(
                f"{self.dropped_tokens} more dropped, because {self.cut_documents} "
                "documents are longer than the preprocessor's sequence_length"
            )
        if self.unpacked_documents:
            parts.append(
                f"{self.unpacked_tokens} more left out by pack, because "
                f"{self.unpacked_documents} documents are longer than a row"
            )
        if self.split_documents:
            parts.append(f"{self.split_documents} documents split")
        if self.empty_documents:
            parts.append(f"{self.empty_documents} documents without a token left out")
        if self.empty_rows:
            parts.append(f"{self.empty_rows} rows without a token")
        if self.live_blocks is not None:
            share = self.live_blocks / max(self.rows, 1)
            parts.append(f"{share:.3g} live blocks per row")
        if self.rows_without_block:
            parts.append(f"none in {self.rows_without_block} rows")
        return ", ".join(parts)


class Losses:
    """What rows do not say of their documents, kept until some of them are chosen.

    It is told in place of a `DataReport`.

    Attributes:
        lost: int array `[N]`, tokens that had no place, or `None`.
        packing: `PackingReport` of rows that were packed, or `None`.
    """

    def __init__(self) -> None:
        self.lost: np.ndarray | None = None
        self.packing: PackingReport | None = None

    def count(self, rows: Rows, lost: np.ndarray | None = None) -> None:
        """Keeps what had no place."""
        self.lost = lost

    def count_packing(self, packing: PackingReport) -> None:
        """Keeps what `pack` did."""
        self.packing = packing

    def of_first(self, kept: int, report: DataReport) -> None:
        """Adds the losses of the first rows, and of the packing, which has no rows."""
        if self.lost is not None:
            report.count_lost(self.lost[:kept])
        if self.packing is not None:
            report.count_left_out(self.packing)


class DataLog(keras.callbacks.Callback):
    """Says once per `fit` what has become of the documents.

    When training begins for documents in memory, and after the first epoch for a
    stream; as a warning where some of them count for nothing.

    Args:
        report: `DataReport` that is filled while batches are read.
        packing: function that returns the `PackingReport` of an epoch that is over,
            `None` of rows that were not packed.
    """

    def __init__(
        self, report: DataReport, packing: Callable[[], PackingReport | None]
    ) -> None:
        super().__init__()
        self.report = report
        self.packing = packing
        self.said = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Says it, if all is known."""
        if self.report.complete:
            self._say()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Says it after the first epoch.

        Raises:
            ValueError: if nothing counted in all of it.
        """
        if self.said or not self.report.rows:
            return
        self.report.complete = True
        packing = self.packing()
        if packing is not None:
            self.report.count_packing(packing)
        self._say()
        self.report.check_counts()

    def _say(self) -> None:
        self.said = True
        level = logging.WARNING if self.report.loses else logging.INFO
        logger.log(level, "Data of this training: %s.", self.report)
