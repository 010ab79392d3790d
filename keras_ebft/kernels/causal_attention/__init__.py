"""Causal attention within the documents of a row."""

from keras_ebft.kernels import dispatch
from keras_ebft.kernels.causal_attention.implementations import IMPLEMENTATIONS
from keras_ebft.typing import Tensor

dispatch.register("causal_attention", IMPLEMENTATIONS)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    starts: Tensor | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention that stays within each document of a row.

    Token i sees tokens `starts[i] ... i`.

    Args:
        query: float tensor `[B, T, H, d]`.
        key: float tensor `[B, T, Hkv, d]`; Hkv divides H (grouped queries).
        value: float tensor `[B, T, Hkv, d]`.
        scale: float, factor on the scores.
        starts: int32 tensor `[B, T]`, first token of each token's document, or
            `None` for 0.
        sliding_window: int or `None`; a key is seen if
            `query position - key position < sliding_window`.
        soft_cap: float or `None`; scores become `cap * tanh(scores / cap)`.

    Returns:
        float tensor `[B, T, H, d]` in the dtype of `query`.
    """
    run = dispatch.choose(
        "causal_attention",
        (query, key, value),
        head_size=query.shape[-1],
        options=dispatch.in_use(
            starts=starts, sliding_window=sliding_window, soft_cap=soft_cap
        ),
        settings={
            "scale": scale,
            "sliding_window": sliding_window,
            "soft_cap": soft_cap,
        },
    )
    return run(
        query,
        key,
        value,
        scale=scale,
        starts=starts,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
