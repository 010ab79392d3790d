"""The layer route: attention layers with other methods for the length of a call.

These families project queries, keys and values, rotate them by position and hand
them to a method of their own. Lending the layer another method there, and its
rotary embedding the given positions, is all a block-parallel pass needs.
"""

import contextlib
import functools

from keras import ops

from keras_ebft.networks.lending import lent

# ALiBi positions are split in two, so that half precision holds both exactly.
POSITION_UNIT = 128


@contextlib.contextmanager
def layer_route(attend, backbone, attention_name, decoders, positions):
    """Context in which decoder layers of a backbone call `attend`.

    Args:
        attend: function `(query, key, value, scale, sliding_window, soft_cap)` of
            `[tokens, 1, heads, head_dim]` tensors, returns the output.
        backbone: KerasHub backbone of a family on the layer route.
        attention_name: str, attribute of a decoder layer.
        decoders: list of decoder layers that will run.
        positions: int32 tensor `[tokens, 1]`.
    """
    with contextlib.ExitStack() as stack:
        for decoder in decoders:
            attention = getattr(decoder, attention_name)
            lend = LENDERS.get(type(backbone).__name__, _lend_rotary)
            for owner, name, method in lend(decoder, attention, attend, positions):
                stack.enter_context(lent(owner, name, method))
        yield


def _lend_rotary(decoder, attention, attend, positions):
    """Layers with `_compute_attention` and a rotary embedding by position."""
    rotary = attention.rotary_embedding_layer
    yield rotary, "call", functools.partial(rotary.call, positions=positions)
    yield attention, "_compute_attention", _attention_method(decoder, attention, attend)


def _lend_tables(decoder, attention, attend, positions):
    """SmolLM3: one table of cosines and sines for a sequence at a time."""
    rotary = attention.rotary_embedding
    tables = rotary.call

    def call(inputs, start_index=0):
        # All tokens as one sequence; the layer adds their index to the start.
        tokens = ops.swapaxes(inputs, 0, 1)
        index = ops.arange(tokens.shape[1], dtype="int32")
        found = tables(tokens, start_index=positions[:, 0] - index)
        return tuple(ops.swapaxes(table, 0, 1)[:, :1] for table in found)

    yield rotary, "call", call
    yield attention, "_compute_attention", _attention_method(decoder, attention, attend)


def _lend_gemma3n(decoder, attention, attend, positions):
    """Gemma 3n: heads before tokens, and two results."""
    rotary = attention.rotary_embedding

    def compute_attention(query, key, value, *_, **__):
        query, key, value = (ops.swapaxes(t, 1, 2) for t in (query, key, value))
        # Queries and keys are normalised; nothing scales their products.
        return attend(query, key, value, 1.0, attention.sliding_window), None

    yield rotary, "call", functools.partial(rotary.call, positions=positions)
    yield attention, "_compute_attention", compute_attention


def _attention_method(decoder, attention, attend):
    def compute_attention(query, key, value, attention_mask=None, *_, **__):
        # Keys and values come repeated for grouped queries.
        groups = getattr(attention, "num_key_value_groups", 1)
        return attend(
            query,
            key[..., ::groups, :],
            value[..., ::groups, :],
            attention._inv_norm_factor,
            _window(decoder, attention),
        )

    return compute_attention


def _window(decoder, attention):
    """The sliding window that the plain forward pass applies, or `None`."""
    name = type(attention).__name__
    if name == "CachedMixtralAttention":
        return decoder.sliding_window
    if name == "QwenMoeAttention":
        windowed = attention.use_sliding_window_attention
        fused = attention._use_fused_attention_op()
        return attention.sliding_window_size if windowed and not fused else None
    if name == "Qwen3MoeAttention":
        return None if _fused() else attention.sliding_window_size
    return None


def _fused():
    from keras_hub.src.utils.keras_utils import fused_attention_op_available

    return fused_attention_op_available()


def _lend_falcon(decoder, attention, attend, positions):
    """Falcon: a bias by position, within the scaled scores."""
    ones = ops.ones((1, 2), dtype="int32")
    bias = decoder._build_alibi_tensor(attention.num_heads, ones)

    def call(inputs, *_, **__):
        projected = (
            attention.query_dense(inputs),
            attention.key_dense(inputs),
            attention.value_dense(inputs),
        )
        slopes = bias[0, :, 0, 1] - bias[0, :, 0, 0]
        scale = attention.inv_norm_factor
        output = _attend_with_bias(attend, *projected, scale, slopes, positions)
        return attention.output_dense(ops.reshape(output, inputs.shape))

    yield attention, "call", call


def _lend_bloom(decoder, attention, attend, positions):
    """Bloom: a bias by position, added to the scaled scores."""

    def call(hidden_states, *_, **__):
        projected = (
            attention._query_dense(hidden_states),
            attention._key_dense(hidden_states),
            attention._value_dense(hidden_states),
        )
        scale = attention.inv_norm_factor
        bias = attention._alibi_layer._get_alibi_bias(attention.num_heads, 2)
        slopes = (bias[0, :, 0, 1] - bias[0, :, 0, 0]) / scale
        output = _attend_with_bias(attend, *projected, scale, slopes, positions)
        return attention._output_dense(ops.reshape(output, hidden_states.shape))

    yield attention, "call", call


def _attend_with_bias(attend, query, key, value, scale, slopes, positions):
    """Attention with `slope * position of the key` added to `query . key`.

    The bias is two more coordinates: the slope in every query, the position in
    every key. A softmax over keys makes no difference between absolute positions
    and those relative to the query.
    """
    width = query.shape[-1]
    slopes = ops.broadcast_to(
        ops.cast(slopes, query.dtype)[None, None, :, None], (*query.shape[:-1], 1)
    )
    query = ops.concatenate([query, slopes * POSITION_UNIT, slopes], axis=-1)
    parts = ops.stack([positions // POSITION_UNIT, positions % POSITION_UNIT], axis=-1)
    parts = ops.cast(parts, key.dtype)[:, :, None, :]
    key = ops.concatenate([key, ops.broadcast_to(parts, (*key.shape[:-1], 2))], axis=-1)
    value = ops.pad(value, [*[(0, 0)] * (len(value.shape) - 1), (0, 2)])
    return attend(query, key, value, scale)[..., :width]


LENDERS = {
    "BloomBackbone": _lend_bloom,
    "FalconBackbone": _lend_falcon,
    "Gemma3nBackbone": _lend_gemma3n,
    "SmolLM3Backbone": _lend_tables,
}
