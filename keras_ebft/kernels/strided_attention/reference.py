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
    grouped = _group_heads(query, key.shape[-2])
    options = {"scale": scale, "soft_cap": soft_cap}
    query_step = query_offset + ops.arange(query.shape[3], dtype="int32")
    key_step = ops.arange(key.shape[3], dtype="int32")
    distance = query_step[:, None] - key_step[None, :]
    own_scores = _scores("bnkqhgd,bnkphd->bhgnkqp", grouped, key, **options)
    own = _Part(
        _hide(own_scores, distance, sliding_window), value, "bhgnkqp,bnkphd->bnkqhgd"
    )
    if document_key is None:
        return ops.reshape(_attend([own], query.dtype), query.shape)

    index = ops.arange(document_key.shape[1], dtype="int32")
    to_anchor = _per_row(anchors)[..., None, None] - index
    visible = to_anchor > 0
    if starts is not None:
        visible = ops.logical_and(visible, index >= _per_row(starts)[..., None, None])
    scores = _scores("bnkqhgd,bthd->bhgnkqt", grouped, document_key, **options)
    # [B or 1, K, Q, T] against [B, Hkv, g, n, K, Q, T].
    distance = to_anchor + query_step[:, None]
    scores = _hide(
        scores,
        distance[:, None, None, None],
        sliding_window,
        visible=visible[:, None, None, None],
    )
    document = _Part(scores, document_value, "bhgnkqt,bthd->bnkqhgd")
    return ops.reshape(_attend([document, own], query.dtype), query.shape)


class _Part:
    """Scores against one set of keys, and the values they weigh."""

    def __init__(self, scores, values, equation):
        self.scores = scores
        self.values = values
        self.equation = equation

    def weigh(self, weights, dtype):
        return ops.einsum(self.equation, ops.cast(weights, dtype), self.values)


def _attend(parts, dtype):
    """Softmax over the keys of all parts together, without joining them.

    Written out, because TensorFlow's fused softmax takes no more than five axes
    on processors where it runs through oneDNN.
    """
    largest = ops.max(parts[0].scores, axis=-1, keepdims=True)
    for part in parts[1:]:
        highest = ops.max(part.scores, axis=-1, keepdims=True)
        largest = ops.maximum(largest, highest)
    largest = ops.stop_gradient(largest)
    weights = [ops.exp(part.scores - largest) for part in parts]
    total = sum(ops.sum(weight, axis=-1, keepdims=True) for weight in weights)
    outputs = [
        part.weigh(weight / total, dtype) for part, weight in zip(parts, weights)
    ]
    return sum(outputs[1:], start=outputs[0])


def _per_row(places):
    """`[K]` or `[B, K]` integers as a tensor `[1 or B, K]`."""
    places = ops.convert_to_tensor(places, dtype="int32")
    return places if len(places.shape) == 2 else places[None]


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
