"""Which row each piece of text goes to: in-order and best-fit packing.

Both take the lengths of all pieces at once. Their Python loops run over rows or
over distinct lengths, never over pieces or tokens.
"""

import bisect

import numpy as np


def in_order(lengths, capacity):
    """Fills rows with pieces in their given order.

    A row is closed by the first piece that does not fit it.

    Args:
        lengths: int array `[P]`, each in `[1, capacity]`.
        capacity: int, tokens per row.

    Returns:
        int64 array `[P]`, the row of every piece, counted from 0.

    Example:
    >>> in_order(np.array([3, 4, 6, 2]), capacity=8)
    array([0, 0, 1, 1])
    """
    ends = np.cumsum(lengths)
    # The first piece of the next row, were a row to begin with this piece.
    following = np.searchsorted(ends, ends - lengths + capacity, side="right").tolist()
    opens_row = np.zeros(len(lengths), dtype="int64")
    piece = 0
    while piece < len(lengths):
        opens_row[piece] = 1
        piece = following[piece]
    return np.cumsum(opens_row) - 1


def best_fit(lengths, capacity):
    """Puts every piece, longest first, into the fullest row that has room for it.

    Pieces of one length are placed together, so that the cost depends on the
    number of distinct lengths and hardly on the number of pieces.

    Args:
        lengths: int array `[P]`, each in `[1, capacity]`.
        capacity: int, tokens per row.

    Returns:
        int64 array `[P]`, the row of every piece. Rows are counted from 0 in the
        order of their first pieces, so that packing keeps the order roughly.

    Example:
    >>> best_fit(np.array([3, 4, 6, 2, 1]), capacity=8)
    array([0, 0, 1, 1, 0])
    """
    rows = np.empty(len(lengths), dtype="int64")
    by_length = np.argsort(-lengths, kind="stable")
    changes = np.flatnonzero(np.diff(lengths[by_length])) + 1
    partly_filled = _RowsByRoom()
    num_rows = 0
    for pieces in np.split(by_length, changes) if len(lengths) else ():
        length = int(lengths[pieces[0]])
        left = partly_filled.place(pieces, length, rows)
        per_row = capacity // length
        full, rest = divmod(left.size, per_row)
        opened = num_rows + np.arange(full + (rest > 0))
        rows[left] = np.repeat(opened, per_row)[: left.size]
        partly_filled.put(capacity - per_row * length, opened[:full])
        partly_filled.put(capacity - rest * length, opened[full:])
        num_rows += opened.size
    return _number_by_first_piece(rows, num_rows)


class _RowsByRoom:
    """Rows that have room left, by how much."""

    def __init__(self):
        self._rooms = []
        self._rows = {}

    def place(self, pieces, length, rows):
        """Writes rows with room for pieces of `length` to `rows`.

        Returns:
            the pieces that fit nowhere.
        """
        while pieces.size and (room := self._smallest_room(length)):
            chosen = self._take(room, pieces.size)
            rows[pieces[: chosen.size]] = chosen
            pieces = pieces[chosen.size :]
            self.put(room - length, chosen)
        return pieces

    def put(self, room, rows):
        """Adds `rows` with `room` left."""
        if not room or not rows.size:
            return
        if room not in self._rows:
            bisect.insort(self._rooms, room)
            self._rows[room] = []
        self._rows[room].append(rows)

    def _smallest_room(self, length):
        """The smallest room of at least `length`, or `None`."""
        place = bisect.bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else None

    def _take(self, room, most):
        """Removes up to `most` rows with `room` left."""
        stack = self._rows[room]
        rows = stack.pop()
        if rows.size > most:
            stack.append(rows[most:])
            rows = rows[:most]
        if not stack:
            del self._rows[room]
            del self._rooms[bisect.bisect_left(self._rooms, room)]
        return rows


def _number_by_first_piece(rows, num_rows):
    first_pieces = np.full(num_rows, len(rows))
    np.minimum.at(first_pieces, rows, np.arange(len(rows)))
    numbers = np.empty(num_rows, dtype="int64")
    numbers[np.argsort(first_pieces)] = np.arange(num_rows)
    return numbers[rows]


# "stream": one piece after the other, which fills every row but the last.
STRATEGIES = {"in_order": in_order, "best_fit": best_fit, "stream": in_order}
