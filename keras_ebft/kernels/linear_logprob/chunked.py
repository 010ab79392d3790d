"""`linear_logprob` over chunks of rows, recomputing logits in the backward pass."""

from keras import ops

from keras_ebft.kernels.linear_logprob.reference import (
    log_prob_and_entropy,
    scaled_logits,
)
from keras_ebft.kernels.row_chunks import chunk_rows


def linear_logprob_chunked(hidden, head, labels, *, temperature=1.0, soft_cap=None):
    """See `keras_ebft.kernels.linear_logprob`."""
    rows = hidden.shape[0]
    num_chunks, size = chunk_rows(rows, head.shape[0])
    padding = num_chunks * size - rows
    hidden = ops.pad(hidden, ((0, padding), (0, 0)))
    labels = ops.pad(labels, ((0, padding),))
    options = {"temperature": temperature, "soft_cap": soft_cap}

    # One stacked output: PyTorch's `custom_gradient` allows no more. Labels are an
    # argument, and floats (exact up to 2^24), because JAX allows neither a closure
    # over traced values nor the same gradient for integers as the others.
    @ops.custom_gradient
    def log_prob_and_entropy_rows(hidden, head, float_labels):
        labels = ops.cast(float_labels, "int32")

        def gradient(*args, upstream=None):
            upstream = args[-1] if upstream is None else upstream
            found = _backward(
                hidden, head, labels, upstream, num_chunks, size, **options
            )
            return (*found, ops.zeros_like(float_labels))

        return _forward(hidden, head, labels, num_chunks, size, **options), gradient

    stacked = log_prob_and_entropy_rows(hidden, head, ops.cast(labels, "float32"))
    return stacked[0, :rows], stacked[1, :rows]


def _forward(hidden, head, labels, num_chunks, size, **options):
    def chunk(start):
        logits = scaled_logits(_rows(hidden, start, size), head, **options)
        return ops.stack(log_prob_and_entropy(logits, _rows(labels, start, size))[:2])

    if num_chunks == 1:
        return chunk(0)

    def body(index, output):
        start = index * size
        return ops.slice_update(output, (0, start), chunk(start))

    output = ops.zeros((2, num_chunks * size), dtype="float32")
    return ops.fori_loop(0, num_chunks, body, output)


def _backward(hidden, head, labels, upstream, num_chunks, size, **options):
    def chunk(start):
        hidden_rows = _rows(hidden, start, size)
        logit_gradient = _logit_gradient(
            hidden_rows,
            head,
            _rows(labels, start, size),
            ops.slice(upstream, (0, start), (2, size)),
            **options,
        )
        logit_gradient = ops.cast(logit_gradient, head.dtype)
        head_part = ops.matmul(ops.transpose(logit_gradient), hidden_rows)
        return ops.matmul(logit_gradient, head), ops.cast(head_part, "float32")

    if num_chunks == 1:
        hidden_gradient, head_gradient = chunk(0)
        return hidden_gradient, ops.cast(head_gradient, head.dtype)

    def body(index, carry):
        hidden_gradient, head_gradient = carry
        start = index * size
        hidden_part, head_part = chunk(start)
        hidden_gradient = ops.slice_update(hidden_gradient, (start, 0), hidden_part)
        return hidden_gradient, head_gradient + head_part

    start = (ops.zeros_like(hidden), ops.zeros(head.shape, dtype="float32"))
    hidden_gradient, head_gradient = ops.fori_loop(0, num_chunks, body, start)
    return hidden_gradient, ops.cast(head_gradient, head.dtype)


def _logit_gradient(hidden, head, labels, upstream, *, temperature, soft_cap):
    """Gradient with respect to the uncapped, unscaled logits of one chunk.

    d log_prob / dz = onehot - p;  d entropy / dz = -p (log p + entropy).
    """
    logits = scaled_logits(hidden, head, temperature=temperature, soft_cap=soft_cap)
    _, entropy, normaliser = log_prob_and_entropy(logits, labels)
    log_probability = logits - normaliser[:, None]
    probability = ops.exp(log_probability)
    token = ops.arange(logits.shape[1], dtype="int32")
    onehot = ops.cast(token[None, :] == labels[:, None], "float32")
    gradient = upstream[0][:, None] * (onehot - probability) - upstream[1][
        :, None
    ] * probability * (log_probability + entropy[:, None])
    if soft_cap is not None:
        # z temperature / cap is the tanh itself.
        slope = 1.0 - ops.square(logits * (temperature / soft_cap))
        gradient = gradient * slope
    return gradient / temperature


def _rows(tensor, start, size):
    if len(tensor.shape) == 1:
        return ops.slice(tensor, (start,), (size,))
    return ops.slice(tensor, (start, 0), (size, tensor.shape[1]))
