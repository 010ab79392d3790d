"""`linear_sample` over chunks of rows."""

from keras import ops

from keras_ebft.kernels.linear_sample.reference import linear_sample_reference
from keras_ebft.kernels.row_chunks import chunk_rows


def linear_sample_chunked(hidden, head, uniform, **options):
    """See `keras_ebft.kernels.linear_sample`."""
    rows, width = hidden.shape
    num_chunks, size = chunk_rows(rows, head.shape[0])
    if num_chunks == 1:
        return linear_sample_reference(hidden, head, uniform, **options)
    padding = num_chunks * size - rows
    hidden = ops.pad(hidden, ((0, padding), (0, 0)))
    uniform = ops.pad(uniform, ((0, padding),))

    def body(index, carry):
        start = index * size
        tokens, log_prob = linear_sample_reference(
            ops.slice(hidden, (start, 0), (size, width)),
            head,
            ops.slice(uniform, (start,), (size,)),
            **options,
        )
        return (
            ops.slice_update(carry[0], (start,), tokens),
            ops.slice_update(carry[1], (start,), log_prob),
        )

    start = (
        ops.zeros((num_chunks * size,), dtype="int32"),
        ops.zeros((num_chunks * size,), dtype="float32"),
    )
    token_ids, log_prob = ops.fori_loop(0, num_chunks, body, start)
    return token_ids[:rows], log_prob[:rows]
