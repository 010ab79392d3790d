"""`linear_sample` over chunks of rows."""

from keras import ops

from keras_ebft.backend.replicas import parts_of_program
from keras_ebft.kernels.linear_logprob.reference import scaled_logits
from keras_ebft.kernels.linear_sample.reference import sample_logits
from keras_ebft.kernels.projection import projection
from keras_ebft.kernels.row_chunks import RowChunks, chunk_rows


def linear_sample_chunked(hidden, head, uniform, **options):
    """See `keras_ebft.kernels.linear_sample`."""
    return sample_chunks(_sample, hidden, head, uniform, **options)


def sample_chunks(sample, hidden, head, uniform, **options):
    """`sample`, a `linear_sample` with all logits in memory, of chunks of rows."""
    rows = hidden.shape[0]
    parts = parts_of_program(rows)
    num_chunks, _ = chunk_rows(rows // parts, head.shape[0])
    if num_chunks == 1:
        return sample(hidden, head, uniform, **options)
    chunks = RowChunks(rows, parts, num_chunks)
    hidden, uniform = chunks.cut(hidden), chunks.cut(uniform)

    def body(index, carry):
        found = sample(
            chunks.at(hidden, index), head, chunks.at(uniform, index), **options
        )
        return tuple(
            chunks.put(whole, index, chunk) for whole, chunk in zip(carry, found)
        )

    start = chunks.zeros(dtype="int32"), chunks.zeros()
    token_ids, log_prob = ops.fori_loop(0, num_chunks, body, start)
    return chunks.joined(token_ids), chunks.joined(log_prob)


def _sample(hidden, head, uniform, *, temperature=1.0, soft_cap=None, **kept):
    logits = scaled_logits(
        hidden,
        head,
        temperature=temperature or 1.0,
        soft_cap=soft_cap,
        multiply=projection,
    )
    return sample_logits(logits, uniform, temperature, **kept)
