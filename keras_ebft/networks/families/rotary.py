"""Families with rotary positions that offer no way to supply attention.

They project queries, keys and values, rotate them by position and hand them to a
method of their own. Another method there, and the given positions in the rotary
embedding, is all a block-parallel pass needs.
"""

import functools

from keras import ops

from keras_ebft.networks.families.family import Family
from keras_ebft.networks.families.patched import PatchedAttention
from keras_ebft.networks.families.serving import fused_attention
from keras_ebft.networks.patches import Patch


def rotary_patches(decoder, attend, positions, attention="_self_attention_layer"):
    """Attention with `_compute_attention` and a rotary embedding by position.

    Args:
        decoder: decoder layer.
        attend: see `Family.attention`.
        positions: int32 tensor `[tokens, 1]`.
        attention: str, the decoder's attention layer.

    Returns:
        list of `Patch`.
    """
    attention = getattr(decoder, attention)
    rotary = attention.rotary_embedding_layer
    return [
        Patch(rotary, "call", functools.partial(rotary.call, positions=positions)),
        Patch(attention, "_compute_attention", _method(attention, attend)),
    ]


def table_patches(decoder, attend, positions):
    """SmolLM3: one table of cosines and sines for a sequence at a time."""
    attention = decoder.self_attn
    rotary = attention.rotary_embedding
    tables = rotary.call

    def call(inputs, start_index=0):
        # All tokens as one sequence; the layer adds their index to the start.
        tokens = ops.swapaxes(inputs, 0, 1)
        index = ops.arange(tokens.shape[1], dtype="int32")
        table = tables(tokens, start_index=positions[:, 0] - index)
        return tuple(ops.swapaxes(part, 0, 1)[:, :1] for part in table)

    return [
        Patch(rotary, "call", call),
        Patch(attention, "_compute_attention", _method(attention, attend)),
    ]


def _method(attention, attend):
    def compute_attention(query, key, value, attention_mask=None, *_, **__):
        # Keys and values come repeated for grouped queries.
        groups = getattr(attention, "num_key_value_groups", 1)
        key, value = key[..., ::groups, :], value[..., ::groups, :]
        return attend(query, key, value, attention._inv_norm_factor)

    return compute_attention


def _mixtral_window(decoder, reported):
    return decoder.sliding_window


def _qwen_moe_window(decoder, reported):
    attention = decoder._self_attention_layer
    windowed = attention.use_sliding_window_attention
    fused = attention._use_fused_attention_op()
    return attention.sliding_window_size if windowed and not fused else None


def _qwen3_moe_window(decoder, reported):
    if fused_attention():
        return None
    return decoder._self_attention_layer.sliding_window_size


def _norm(backbone):
    return backbone.norm


def _has_long_rope(backbone):
    """Whether frequencies depend on the length of the sequence."""
    return backbone.rope_scaling_type is not None


ROTARY = PatchedAttention(rotary_patches)
ROTARY_OF_PHI3 = PatchedAttention(
    functools.partial(rotary_patches, attention="attention")
)

FAMILIES = (
    Family(backbone="GPTNeoXBackbone", repeated=True, attention=ROTARY),
    Family(
        backbone="MixtralBackbone",
        repeated=True,
        attention=ROTARY,
        window=_mixtral_window,
    ),
    Family(
        backbone="Phi3Backbone",
        repeated=True,
        attention=ROTARY_OF_PHI3,
        only_rows=_has_long_rope,
    ),
    Family(
        backbone="QwenMoeBackbone",
        attention=ROTARY,
        window=_qwen_moe_window,
        tying_setting="tie_word_embeddings",
    ),
    Family(
        backbone="Qwen3MoeBackbone",
        attention=ROTARY,
        window=_qwen3_moe_window,
        tying_setting="tie_word_embeddings",
    ),
    Family(
        backbone="SmolLM3Backbone",
        attention=PatchedAttention(table_patches),
        final_norm=_norm,
        per_layer_settings=("layer_types", "rope_layer_enabled_list"),
    ),
)
