"""Tokens sampled from the output head, without all logits in memory."""

from keras import ops

from keras_ebft.kernels import dispatch
from keras_ebft.kernels.linear_sample.implementations import IMPLEMENTATIONS
from keras_ebft.typing import Tensor

dispatch.register("linear_sample", IMPLEMENTATIONS)


def linear_sample(
    hidden: Tensor,
    head: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples one token per row by inverting the cumulative distribution.

    The token is the first whose cumulative probability under
    `softmax(cap(hidden head^T) / temperature)` exceeds `uniform`: one random
    number decides one token, whatever the batch around it. With `top_k` only the
    k likeliest tokens take part (and those as likely as the last of them), with
    `top_p` the fewest that hold this share of the mass (of the k, where both are
    given). Temperature 0 takes the likeliest. Nothing of it has a gradient.

    Args:
        hidden: float tensor `[R, D]`, final hidden states.
        head: float tensor `[V, D]`, the output projection.
        uniform: float32 tensor `[R]`, uniform in [0, 1).
        temperature: float, not negative.
        top_k: int or `None`.
        top_p: float in (0, 1].
        soft_cap: float or `None`.

    Returns:
        `(token_ids, log_prob)`: int32 `[R]` and float32 `[R]`, in nats: the
        log-probability under the whole distribution, not the truncated one; at
        temperature 1 where `temperature` is 0.
    """
    hidden, head = ops.stop_gradient(hidden), ops.stop_gradient(head)
    options = dispatch.in_use(
        soft_cap=soft_cap,
        top_k=top_k,
        top_p=top_p < 1.0,
        greedy=temperature == 0.0,
    )
    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "soft_cap": soft_cap,
    }
    run = dispatch.choose(
        "linear_sample", (hidden, head), options=options, settings=settings
    )
    return run(hidden, head, uniform, **settings)
