"""Splits rows into equal chunks, so that `[rows, vocabulary]` never exists."""

from keras import ops

from keras_ebft.kernels.projection import projection

# Floats of one `[rows, vocabulary]` chunk: 8 MiB in float32.
CHUNK_ELEMENTS = 2**21
# Fewer rows than this would leave matrix products bound by reading the head.
MIN_CHUNK_ROWS = 64


def chunk_rows(rows, columns):
    """Number of chunks and rows per chunk for `rows x columns` elements.

    Args:
        rows: int.
        columns: int, elements per row.

    Returns:
        `(num_chunks, rows_per_chunk)`; their product is `rows` or a little more,
        so that the last chunk is padded as little as possible.
    """
    limit = max(CHUNK_ELEMENTS // columns, MIN_CHUNK_ROWS)
    num_chunks = -(-rows // limit)
    return num_chunks, -(-rows // num_chunks)


class RowChunks:
    """Rows `[R, ...]` cut into chunks that each hold as many rows of every device.

    Chunks of rows that follow one another would lie on one device of several after the
    other: all of them would be sent everything, and each do the work of all.

    Args:
        rows: int, R.
        parts: int, devices that the rows lie on, the first device's first; divides R.
        count: int, number of chunks.
    """

    def __init__(self, rows, parts, count):
        self.parts, self.count = parts, count
        self._rows_of_part = rows // parts
        self._size_of_part = -(-self._rows_of_part // count)
        # Rows of a chunk.
        self.size = parts * self._size_of_part

    def cut(self, tensor):
        """`[R, ...]` as `[parts, chunks, size of a part, ...]`, with rows of 0."""
        shape = tuple(tensor.shape[1:])
        padding = self.count * self._size_of_part - self._rows_of_part
        if padding:
            tensor = ops.reshape(tensor, (self.parts, self._rows_of_part, *shape))
            nothing = ((0, 0) for _ in shape)
            tensor = ops.pad(tensor, ((0, 0), (0, padding), *nothing))
        return ops.reshape(tensor, (self.parts, self.count, self._size_of_part, *shape))

    def at(self, cut, index):
        """Chunk `[size, ...]` of what `cut` returned."""
        shape = tuple(cut.shape[3:])
        nothing = (0 for _ in shape)
        own = (self.parts, 1, self._size_of_part, *shape)
        chunk = ops.slice(cut, (0, index, 0, *nothing), own)
        return ops.reshape(chunk, (self.size, *shape))

    def put(self, cut, index, chunk):
        """`cut` with another chunk `[size, ...]`."""
        shape = tuple(cut.shape[3:])
        nothing = (0 for _ in shape)
        chunk = ops.reshape(chunk, (self.parts, 1, self._size_of_part, *shape))
        return ops.slice_update(cut, (0, index, 0, *nothing), chunk)

    def joined(self, cut):
        """The tensor `[R, ...]` that `cut` made this of."""
        shape = tuple(cut.shape[3:])
        rows = self.count * self._size_of_part
        if rows != self._rows_of_part:
            cut = ops.reshape(cut, (self.parts, rows, *shape))[:, : self._rows_of_part]
        return ops.reshape(cut, (self.parts * self._rows_of_part, *shape))

    def zeros(self, *shape, dtype="float32"):
        """What `put` fills, for rows of this shape."""
        return ops.zeros(
            (self.parts, self.count, self._size_of_part, *shape), dtype=dtype
        )

    def products(self, left, right):
        """`left^T right` of chunks `[size, L]` and `[size, R]`, each part's own.

        Returns:
            tensor `[parts, L, R]`. What is added up over chunks stays where it is, and
            is summed over devices once, in the end.
        """
        if self.parts == 1:
            # In a batch of one XLA takes half as long again on a CPU.
            return projection(ops.transpose(left), right)[None]
        left, right = (
            ops.reshape(v, (self.parts, self._size_of_part, v.shape[1]))
            for v in (left, right)
        )
        return ops.matmul(ops.transpose(left, (0, 2, 1)), right)
