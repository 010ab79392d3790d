"""Splits rows into equal chunks, so that `[rows, vocabulary]` never exists."""

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
