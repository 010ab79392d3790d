"""A window of documents as flat token arrays, cut into pieces and laid into rows."""

import numpy as np


class TokenWindow:
    """Some documents, packed together.

    Args:
        documents: list of `(token_ids, answer_start)`: int arrays `[t]` with t
            above 0, and the index of the first answer token.
        length: int, tokens per row.
        assign_rows: function of `(lengths, capacity)` from
            `keras_ebft.data.bin_packing`.
        joined: bool, whether all documents are one text, cut where rows end.

    Attributes:
        num_rows: int.
        num_split: int, documents that were cut.
    """

    def __init__(self, documents, length, assign_rows, joined=False):
        self.length = length
        lengths = np.array([len(ids) for ids, _ in documents])
        self._token_ids = np.concatenate([ids for ids, _ in documents])
        self._answer_mask = _answer_mask(lengths, [start for _, start in documents])
        texts = lengths.sum(keepdims=True) if joined else lengths
        starts, sizes = _cut(texts, length)
        rows = assign_rows(sizes, length)
        order = np.argsort(rows, kind="stable")
        self._starts, self._sizes, self._rows = starts[order], sizes[order], rows[order]
        self._numbers, self._columns = _positions_in_rows(self._sizes, self._rows)
        self.num_rows = int(self._rows[-1]) + 1
        self.num_split = _count_cut(lengths, length, joined)

    def rows(self, first, last):
        """Rows `first` to `last` (exclusive).

        Returns:
            dict of arrays `[last - first, length]`: `token_ids` int32,
            `padding_mask` bool, `segment_ids` int32 (0 is padding) and
            `answer_mask` bool.
        """
        pieces = slice(*np.searchsorted(self._rows, [first, last]))
        sizes = self._sizes[pieces]
        within = _ranges(sizes)
        source = np.repeat(self._starts[pieces], sizes) + within
        places = (self._rows[pieces] - first) * self.length + self._columns[pieces]
        target = np.repeat(places, sizes) + within
        shape = (last - first, self.length)
        segment_ids = _scatter(
            shape, target, np.repeat(self._numbers[pieces], sizes), "int32"
        )
        return {
            "token_ids": _scatter(shape, target, self._token_ids[source], "int32"),
            "padding_mask": segment_ids > 0,
            "segment_ids": segment_ids,
            "answer_mask": _scatter(shape, target, self._answer_mask[source], "bool"),
        }


def _answer_mask(lengths, answer_starts):
    if not any(answer_starts):
        return np.ones(int(lengths.sum()), dtype=bool)
    return _ranges(lengths) >= np.repeat(np.array(answer_starts), lengths)


def _cut(lengths, longest):
    """Starts in the flat token array, and sizes, of pieces of at most `longest`."""
    counts = -(-lengths // longest)
    within = _ranges(counts)
    document_starts = np.cumsum(lengths) - lengths
    starts = np.repeat(document_starts, counts) + within * longest
    sizes = np.minimum(np.repeat(lengths, counts) - within * longest, longest)
    return starts, sizes


def _count_cut(lengths, row, joined):
    """Documents whose tokens lie in more than one row."""
    starts = np.cumsum(lengths) - lengths if joined else np.zeros_like(lengths)
    return int(np.sum((starts + lengths - 1) // row > starts // row))


def _positions_in_rows(sizes, rows):
    """Number (from 1) and first column of every piece within its row."""
    opens_row = np.diff(rows, prepend=-1) > 0
    first_pieces = np.flatnonzero(opens_row)[rows]
    numbers = np.arange(len(sizes)) - first_pieces + 1
    starts = np.cumsum(sizes) - sizes
    return numbers, starts - starts[first_pieces]


def _ranges(sizes):
    """`0 ... size - 1` for every size, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def _scatter(shape, places, values, dtype):
    array = np.zeros(shape, dtype)
    array.reshape(-1)[places] = values
    return array
