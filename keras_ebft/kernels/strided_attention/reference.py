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
    starts=None,
    query_offset=0,
    sliding_window=None,
    soft_cap=None,
):
    """See `keras_ebft.kernels.strided_attention`."""
    kv_heads = key.shape[-2]
    grouped = _group_heads(query, kv_heads)  # [B, n, K, Q, Hkv, g, d]
    # How far each key lies behind its query; a query sees keys at 0 and more.
    query_step = query_offset + ops.arange(query.shape[3], dtype="int32")
    key_step = ops.arange(key.shape[3], dtype="int32")
    distance = query_step[:, None] - key_step[None, :]  # [Q, P]
    scores = ops.einsum("bnkqhgd,bnkphd->bhgnkqp", grouped, key)
    visible = ops.broadcast_to(distance >= 0, scores.shape)
    if document_key is not None:
        index = ops.arange(document_key.shape[1], dtype="int32")
        to_anchor = _per_row(anchors)[..., None, None] - index  # [B or 1, K, 1, T]
        seen = to_anchor > 0
        if starts is not None:
            seen = ops.logical_and(seen, index >= _per_row(starts)[..., None, None])
        document = ops.einsum("bnkqhgd,bthd->bhgnkqt", grouped, document_key)
        seen = ops.broadcast_to(seen[:, None, None, None], document.shape)
        visible = ops.concatenate([seen, visible], axis=-1)
        distance = _join(to_anchor + query_step[:, None], distance, document.shape)
        scores = ops.concatenate([document, scores], axis=-1)

    scores = ops.cast(scores, "float32") * scale
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    if sliding_window is not None:
        visible = ops.logical_and(visible, distance < sliding_window)
    weights = _softmax(ops.where(visible, scores, HIDDEN_SCORE))
    weights = ops.cast(weights, query.dtype)

    own = weights[..., -key.shape[3] :]
    output = ops.einsum("bhgnkqp,bnkphd->bnkqhgd", own, value)
    if document_key is not None:
        of_document = weights[..., : document_key.shape[1]]
        output += ops.einsum("bhgnkqt,bthd->bnkqhgd", of_document, document_value)
    return ops.reshape(output, query.shape)


def _join(to_document, to_own, shape):
    """Distances to document keys and own keys, `[B, Hkv, g, n, K, Q, T + P]`."""
    to_document = ops.broadcast_to(to_document[:, None, None, None], shape)
    to_own = ops.broadcast_to(to_own, (*shape[:-1], to_own.shape[-1]))
    return ops.concatenate([to_document, to_own], axis=-1)


def _softmax(scores):
    """Over the last axis; TensorFlow's own takes no more than five axes on a CPU."""
    rows = ops.reshape(scores, (-1, scores.shape[-1]))
    return ops.reshape(ops.softmax(rows, axis=-1), scores.shape)


def _per_row(places):
    """`[K]` or `[B, K]` integers as a tensor `[1 or B, K]`."""
    places = ops.convert_to_tensor(places, dtype="int32")
    return places if len(places.shape) == 2 else places[None]


def _group_heads(query, num_kv_heads):
    *lead, heads, width = query.shape
    return ops.reshape(query, (*lead, num_kv_heads, heads // num_kv_heads, width))
