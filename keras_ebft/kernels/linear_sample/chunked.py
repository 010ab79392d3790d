"""`linear_sample` over chunks of rows."""

from keras import ops

from keras_ebft.backend.replicas import parts_of_program
from keras_ebft.kernels.linear_sample.reference import linear_sample_reference
from keras_ebft.kernels.row_chunks import RowChunks, chunk_rows


def linear_sample_chunked(hidden, head, uniform, **options):
    """See `keras_ebft.kernels.linear_sample`."""
    rows = hidden.shape[0]
    parts = parts_of_program(rows)
    num_chunks, _ = chunk_rows(rows // parts, head.shape[0])
    if num_chunks == 1:
        return linear_sample_reference(hidden, head, uniform, **options)
    chunks = RowChunks(rows, parts, num_chunks)
    hidden, uniform = chunks.cut(hidden), chunks.cut(uniform)

    def body(index, carry):
        found = linear_sample_reference(
            chunks.at(hidden, index), head, chunks.at(uniform, index), **options
        )
        return tuple(
            chunks.put(whole, index, chunk) for whole, chunk in zip(carry, found)
        )

    start = chunks.zeros(dtype="int32"), chunks.zeros()
    token_ids, log_prob = ops.fori_loop(0, num_chunks, body, start)
    return chunks.joined(token_ids), chunks.joined(log_prob)
