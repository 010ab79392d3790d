"""Log-probability of given tokens under the output head, without all logits."""

from keras_ebft.kernels import dispatch
from keras_ebft.kernels.linear_logprob.implementations import IMPLEMENTATIONS
from keras_ebft.typing import Tensor

dispatch.register("linear_logprob", IMPLEMENTATIONS)


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and the entropy of its distribution.

        z = cap(hidden head^T) / temperature
        log_prob = z[label] - logsumexp(z)
        entropy  = logsumexp(z) - sum_v softmax(z)_v z_v

    with `cap(x) = soft_cap * tanh(x / soft_cap)`. Both have gradients with
    respect to `hidden` and `head`.

    Args:
        hidden: float tensor `[R, D]`, final hidden states.
        head: float tensor `[V, D]`, the output projection.
        labels: int32 tensor `[R]`.
        temperature: float.
        soft_cap: float or `None`.

    Returns:
        `(log_prob, entropy)`, each float32 `[R]`, in nats.
    """
    settings = {"temperature": temperature, "soft_cap": soft_cap}
    run = dispatch.choose(
        "linear_logprob",
        (hidden, head),
        options=dispatch.in_use(soft_cap=soft_cap),
        settings=settings,
    )
    return run(hidden, head, labels, **settings)
