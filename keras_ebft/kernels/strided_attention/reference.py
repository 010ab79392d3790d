"""The definition of `strided_attention`, with every score in memory."""

from keras import ops

HIDDEN_SCORE = -1e30


def strided_attention_reference(
    query,
    key,
    value,
    document_key=None,
    document_value=None,
    anchors=None,
    *,
    scale,
    query_offset=0,
    sliding_window=None,
    soft_cap=None,
):
    """See `keras_ebft.kernels.strided_attention`."""
    grouped = _group_heads(query, key.shape[-2])
    options = {"scale": scale, "soft_cap": soft_cap}
    query_step = query_offset + ops.arange(query.shape[3], dtype="int32")
    key_step = ops.arange(key.shape[3], dtype="int32")
    distance = query_step[:, None] - key_step[None, :]
    scores = _scores("bnkqhgd,bnkphd->bhgnkqp", grouped, key, **options)
    scores = _hide(scores, distance, sliding_window)
    if document_key is None:
        weights = _softmax(scores, query.dtype)
        output = ops.einsum("bhgnkqp,bnkphd->bnkqhgd", weights, value)
        return ops.reshape(output, query.shape)

    document_index = ops.arange(document_key.shape[1], dtype="int32")
    anchors = ops.convert_to_tensor(anchors, dtype="int32")[:, None, None]
    to_anchor = anchors - document_index[None, None, :]
    document_scores = _scores("bnkqhgd,bthd->bhgnkqt", grouped, document_key, **options)
    document_scores = _hide(
        document_scores,
        to_anchor + query_step[None, :, None],
        sliding_window,
        visible=to_anchor > 0,
    )
    weights = _softmax(ops.concatenate([document_scores, scores], axis=-1), query.dtype)
    length = document_key.shape[1]
    output = ops.einsum(
        "bhgnkqt,bthd->bnkqhgd", weights[..., :length], document_value
    ) + ops.einsum("bhgnkqp,bnkphd->bnkqhgd", weights[..., length:], value)
    return ops.reshape(output, query.shape)


def _group_heads(query, num_kv_heads):
    *lead, heads, width = query.shape
    return ops.reshape(query, (*lead, num_kv_heads, heads // num_kv_heads, width))


def _scores(equation, query, key, scale, soft_cap):
    scores = ops.cast(ops.einsum(equation, query, key), "float32") * scale
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    return scores


def _hide(scores, distance, sliding_window, visible=None):
    """Hides keys ahead of the query, outside its window or not `visible`."""
    seen = distance >= 0
    if sliding_window is not None:
        seen = ops.logical_and(seen, distance < sliding_window)
    if visible is not None:
        seen = ops.logical_and(seen, visible)
    return ops.where(seen, scores, HIDDEN_SCORE)


def _softmax(scores, dtype):
    return ops.cast(ops.softmax(scores, axis=-1), dtype)
