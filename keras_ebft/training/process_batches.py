"""Batches that each of several processes brings its own rows to."""

import itertools
import zlib

import numpy as np

from keras_ebft.backend.replicas import largest, num_processes, num_shares
from keras_ebft.training.batches import TokenBatches, filled_up
from keras_ebft.training.token_rows import DTYPES, FILLING


class ProcessBatches(TokenBatches):
    """Token batches whose rows are this process's own.

    All processes read batches of one shape, that of the largest, and as many of them as
    the process that has most. Where there is none left, rows are all padding.
    """

    def _signature_of(self, first):
        own = super()._signature_of(first)
        batches = super().batches_per_pass
        shapes = [own[name][0] if name in own else (0, 0) for name in FILLING]
        # What JAX sends has 31 bits.
        checksum = self._checksum >> 1
        *found, lacking, most, greatest, least = largest(
            [
                *itertools.chain(*shapes),
                *(name not in own for name in FILLING),
                batches is None,
                batches or 0,
                checksum,
                -checksum,
            ]
        )
        # One that all processes know their data by, those of the others too.
        self._checksum = zlib.crc32(f"{greatest} {least}".encode())
        self._batches_of_all = None if lacking else most
        sizes, absent = found[: 2 * len(FILLING)], found[2 * len(FILLING) :]
        shapes = dict(zip(FILLING, zip(sizes[::2], sizes[1::2])))
        for name, is_absent in zip(FILLING, absent):
            if is_absent and any(shapes[name]):
                raise ValueError(
                    "Expected documents of one kind in every process. Received: some "
                    f"with '{name}' and some without. Pass it everywhere or nowhere."
                )
        return {
            name: (shape, np.dtype(DTYPES[name]))
            for name, shape in shapes.items()
            if any(shape)
        }

    @property
    def batches_per_pass(self):
        """Batches of all the data; `None` where a process does not know."""
        return self._batches_of_all

    @property
    def batch_size(self):
        """Documents per batch, of all processes together."""
        return self.shape[0] * num_processes()

    def check_end(self):
        """Raises a `ValueError` where processes could end at unlike steps."""
        if self.batches_per_pass is None and not self.endless:
            raise ValueError(
                "Expected a ProcessShare of documents in memory, or of a stream that "
                "knows its length (`len(stream)`), in every process: their epochs have "
                "to be as long. Received: a stream that does not. Pass "
                "`steps_per_epoch`, which goes over each process's data again as often "
                "as it needs."
            )

    def _one_pass(self):
        batches = super()._one_pass()
        if self.endless:
            yield from batches
            return
        read = 0
        for batch in itertools.islice(batches, self.batches_per_pass):
            read += 1
            yield batch
        yield from itertools.repeat(None, self.batches_per_pass - read)

    def _counted(self, batch):
        if batch is not None:
            return super()._counted(batch)
        self.batches_read += 1
        empty = {
            name: np.full(shape, FILLING[name], dtype)
            for name, (shape, dtype) in self.signature.items()
        }
        return self._share_of(empty)

    def _share_of(self, filled):
        return filled_up(filled, num_shares() // num_processes())


def rows_of_each(batch_size):
    """How many of a batch's rows each process brings.

    Args:
        batch_size: int, rows of all of them.

    Raises:
        ValueError: if processes do not divide it.
    """
    rows, left = divmod(batch_size, num_processes())
    if left:
        raise ValueError(
            f"Expected a `batch_size` that {num_processes()} processes divide, each of "
            f"which brings its own rows. Received: {batch_size}."
        )
    return rows
