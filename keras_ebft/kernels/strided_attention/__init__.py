"""Attention of generated tokens to their document's prefix and their own block."""

import numpy as np

from keras_ebft.kernels import dispatch
from keras_ebft.kernels.strided_attention.implementations import IMPLEMENTATIONS
from keras_ebft.typing import Tensor

dispatch.register("strided_attention", IMPLEMENTATIONS)


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_key: Tensor | None = None,
    document_value: Tensor | None = None,
    anchors: Tensor | None = None,
    *,
    scale: float,
    starts: Tensor | None = None,
    query_offset: int = 0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Attention of every block to `document[start:anchor]` and causally to itself.

    Query i of block k sits at row index `anchors[k] + query_offset + i`. It sees
    document keys `starts[k] ... anchors[k] - 1` and keys `0 ... query_offset + i`
    of its own block and sample. Without a document this is plain causal attention.

    Args:
        query: float tensor `[B, n, K, Q, H, d]`.
        key: float tensor `[B, n, K, P, Hkv, d]`; Hkv divides H (grouped queries).
        value: float tensor `[B, n, K, P, Hkv, d]`.
        document_key: float tensor `[B, T, Hkv, d]` or `None`.
        document_value: float tensor `[B, T, Hkv, d]` or `None`.
        anchors: int32 NumPy array `[K]`, the same for all rows and increasing, or
            int32 tensor `[B, K]`; needed with a document.
        scale: float, factor on the scores.
        starts: int32 tensor `[B, K]`, first document key of each block, or `None`
            for 0.
        query_offset: int or int scalar tensor.
        sliding_window: int or `None`; a key is seen if
            `query position - key position < sliding_window`.
        soft_cap: float or `None`; scores become `cap * tanh(scores / cap)`.

    Returns:
        float tensor `[B, n, K, Q, H, d]` in the dtype of `query`.
    """
    run = dispatch.choose(
        "strided_attention",
        (query, key, value, document_key, document_value),
        head_size=query.shape[-1],
        options=dispatch.in_use(
            tensor_anchors=anchors is not None and not isinstance(anchors, np.ndarray),
            tensor_offset=not isinstance(query_offset, int),
            starts=starts,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
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
        document_key,
        document_value,
        anchors,
        scale=scale,
        starts=starts,
        query_offset=query_offset,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
