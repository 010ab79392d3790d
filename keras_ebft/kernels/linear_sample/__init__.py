"""Tokens sampled from the output head, without all logits in memory."""

from keras_ebft.kernels.linear_sample.chunked import linear_sample_chunked


def linear_sample(hidden, head, uniform, *, temperature=1.0, soft_cap=None):
    """Samples one token per row by inverting the cumulative distribution.

    The token is the first whose cumulative probability under
    `softmax(cap(hidden head^T) / temperature)` exceeds `uniform`: one random
    number decides one token, whatever the batch around it.

    Args:
        hidden: float tensor `[R, D]`, final hidden states.
        head: float tensor `[V, D]`, the output projection.
        uniform: float32 tensor `[R]`, uniform in [0, 1).
        temperature: float, above 0.
        soft_cap: float or `None`.

    Returns:
        `(token_ids, log_prob)`: int32 `[R]` and float32 `[R]`, in nats.
    """
    return linear_sample_chunked(
        hidden, head, uniform, temperature=temperature, soft_cap=soft_cap
    )
