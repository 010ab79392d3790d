"""The definition of `causal_attention`, with every score in memory."""

from keras import ops

HIDDEN_SCORE = -1e30


def causal_attention_reference(
    query, key, value, *, scale, starts=None, sliding_window=None, soft_cap=None
):
    """See `keras_ebft.kernels.causal_attention`."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = ops.reshape(query, (batch, length, kv_heads, heads // kv_heads, width))
    scores = ops.einsum("bqhgd,bkhd->bhgqk", grouped, key)
    scores = ops.cast(scores, "float32") * scale
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    visible = _visible(length, starts, sliding_window)
    scores = ops.where(visible[:, None, None], scores, HIDDEN_SCORE)
    weights = ops.cast(ops.softmax(scores, axis=-1), query.dtype)
    output = ops.einsum("bhgqk,bkhd->bqhgd", weights, value)
    return ops.reshape(output, query.shape)


def _visible(length, starts, sliding_window):
    """Which key each query sees, `[1 or B, T, T]`."""
    index = ops.arange(length, dtype="int32")
    distance = index[:, None] - index[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible = ops.logical_and(visible, distance < sliding_window)
    if starts is None:
        return visible[None]
    return ops.logical_and(visible[None], index >= starts[..., None])
