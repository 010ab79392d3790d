"""The definition of `linear_logprob`, with `[R, V]` logits in memory."""

from keras import ops


def scaled_logits(hidden, head, *, temperature=1.0, soft_cap=None, multiply=ops.matmul):
    """Capped logits over the temperature, float32 `[R, V]`."""
    logits = ops.cast(multiply(hidden, ops.transpose(head)), "float32")
    if soft_cap is not None:
        logits = soft_cap * ops.tanh(logits / soft_cap)
    return logits / temperature


def log_prob_and_entropy(logits, labels):
    """`(log_prob, entropy, log-normaliser)` of `[R, V]` logits, each `[R]`."""
    normaliser = ops.logsumexp(logits, axis=-1)
    chosen = ops.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    probability = ops.exp(logits - normaliser[:, None])
    entropy = normaliser - ops.sum(probability * logits, axis=-1)
    return chosen - normaliser, entropy, normaliser


def linear_logprob_reference(hidden, head, labels, *, temperature=1.0, soft_cap=None):
    """See `keras_ebft.kernels.linear_logprob`."""
    logits = scaled_logits(hidden, head, temperature=temperature, soft_cap=soft_cap)
    return log_prob_and_entropy(logits, labels)[:2]
