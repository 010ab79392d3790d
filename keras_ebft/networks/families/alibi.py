"""Families without positions in queries and keys: ALiBi, a bias by distance.

Their attention adds the bias within its `call`, so another `call` stands there.
"""

from keras import ops

from keras_ebft.networks.families.family import Family
from keras_ebft.networks.families.patched import PatchedAttention
from keras_ebft.networks.patches import Patch

# Positions are split in two, so that half precision holds both exactly.
POSITION_UNIT = 128


def bloom_patches(decoder, attend, positions):
    """Bloom: the bias is added to the scaled scores."""
    attention = decoder._self_attention_layer

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

    return [Patch(attention, "call", call)]


def falcon_patches(decoder, attend, positions):
    """Falcon: the bias is scaled together with the scores."""
    attention = decoder.attention_layer
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

    return [Patch(attention, "call", call)]


def _attend_with_bias(attend, query, key, value, scale, slopes, positions):
    """Attention with `slope * position of the key` added to `query . key`.

    The bias is two more coordinates: the slope in every query, the position in
    every key. A softmax over keys makes no difference between absolute positions
    and those relative to the query.

    Args:
        attend: see `Family.attention`.
        query: float tensor `[tokens, 1, heads, head_dim]`.
        key: float tensor `[tokens, 1, heads, head_dim]`.
        value: float tensor `[tokens, 1, heads, head_dim]`.
        scale: float.
        slopes: float tensor `[heads]`.
        positions: int32 tensor `[tokens, 1]`.
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


def _final_layernorm(backbone):
    return backbone.final_layernorm


FAMILIES = (
    Family(backbone="BloomBackbone", attention=PatchedAttention(bloom_patches)),
    Family(
        backbone="FalconBackbone",
        attention=PatchedAttention(falcon_patches),
        final_norm=_final_layernorm,
    ),
)
