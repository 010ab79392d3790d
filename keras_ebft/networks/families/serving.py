"""Families whose attention KerasHub lets a serving engine supply.

Llama, Llama 3, Mistral, Gemma (1 and 2), Gemma 3, GPT-2, OPT, Qwen (2 and 2.5) and
Qwen 3 ask a context of KerasHub's for an attention function and for positions.
"""

import contextlib

from keras import ops

from keras_ebft.networks.families.family import (
    Family,
    call_with_mask,
    embedding_of_graph,
)


class ServedAttention:
    """Attention by KerasHub's context for serving engines; see `Family.attention`."""

    route = "serving"

    def __call__(self, decoder, attend, positions):
        """Context in which the attention of a decoder layer calls `attend`."""

        def engine(cache, query, key, value, scale, *sizes, **options):
            head_dim, num_heads, num_kv_heads = sizes
            output = attend(
                ops.reshape(query, (-1, num_heads, head_dim)),
                ops.reshape(key, (-1, num_kv_heads, head_dim)),
                ops.reshape(value, (-1, num_kv_heads, head_dim)),
                scale,
                **options,
            )
            return cache, ops.reshape(output, (-1, num_heads * head_dim))

        return _serving(engine, positions)


@contextlib.contextmanager
def _serving(engine, positions):
    from keras_hub.src.vllm.context import vllm_context_scope

    with vllm_context_scope(engine, ops.reshape(positions, (-1,))):
        yield


def embedding_by_position(backbone, num_layers):
    """The embeddings of a backbone with learned positions, which it is given."""
    embed = embedding_of_graph(backbone, num_layers)

    def embed_by_position(token_ids, positions):
        with _serving(None, positions):
            return embed(token_ids, positions)

    return embed_by_position


def _gpt2_positions(backbone):
    return backbone.position_embedding.sequence_length


def _opt_positions(backbone):
    return backbone.embeddings.position_embedding.sequence_length


def fused_attention():
    """Whether KerasHub's plain forward pass runs fused attention here."""
    from keras_hub.src.utils.keras_utils import fused_attention_op_available

    return fused_attention_op_available()


def window_unless_fused(decoder, reported):
    """Qwen: fused, KerasHub's plain forward pass attends to everything."""
    return None if fused_attention() else reported


SERVED = ServedAttention()
QWEN = {"window": window_unless_fused, "tying_setting": "tie_word_embeddings"}

FAMILIES = (
    Family(
        backbone="LlamaBackbone",
        repeated=True,
        attention=SERVED,
        tying_setting="tie_word_embeddings",
        layout="llama",
    ),
    Family(
        backbone="Llama3Backbone",
        repeated=True,
        attention=SERVED,
        tying_setting="tie_word_embeddings",
        layout="llama3",
    ),
    Family(
        backbone="MistralBackbone", repeated=True, attention=SERVED, layout="mistral"
    ),
    Family(
        backbone="GemmaBackbone", attention=SERVED, layer=call_with_mask, layout="gemma"
    ),
    Family(
        backbone="Gemma3Backbone",
        attention=SERVED,
        layer=call_with_mask,
        prompts_apart=True,
        layout="gemma3",
    ),
    Family(
        backbone="GPT2Backbone",
        repeated=True,
        attention=SERVED,
        embedding=embedding_by_position,
        maximum_length=_gpt2_positions,
        layout="gpt2",
    ),
    Family(
        backbone="OPTBackbone",
        repeated=True,
        attention=SERVED,
        embedding=embedding_by_position,
        maximum_length=_opt_positions,
    ),
    Family(
        backbone="QwenBackbone", repeated=True, attention=SERVED, **QWEN, layout="qwen2"
    ),
    Family(
        backbone="Qwen3Backbone",
        repeated=True,
        attention=SERVED,
        **QWEN,
        layout="qwen3",
    ),
)
