"""Families that run whole rows only: each block a causal sequence of its own.

Right for anything causal, at the cost of a full forward pass per block and step. What
keeps them from running on shared documents:

- Gemma 4: uppermost layers that attend to keys and values from below, of several
  widths, next to keys that are values.
- GPT-OSS: a sink beside the scores of every head, which no attention kernel here has.
- Qwen 3.5 and RWKV-7: a recurrent state, which runs through a row.
"""

from keras import ops

from keras_ebft.networks.families.family import Family, OutputHead


def _rwkv_layers(backbone):
    return backbone.rwkv_layers


def _before_head(backbone):
    """RWKV-7's backbone ends in logits."""
    return backbone.head.input


def _rwkv_head(backbone):
    return OutputHead(ops.transpose(backbone.head.kernel), None)


FAMILIES = (
    Family(
        backbone="Gemma4Backbone",
        attention=None,
        per_layer_settings=("layer_types",),
        shared_setting="num_kv_shared_layers",
        prompts_apart=True,
    ),
    Family(backbone="GptOssBackbone", attention=None),
    Family(
        backbone="Qwen3_5Backbone",
        attention=None,
        per_layer_settings=("layer_types",),
        tying_setting="tie_word_embeddings",
    ),
    Family(
        backbone="Qwen3_5MoeBackbone",
        attention=None,
        per_layer_settings=("layer_types",),
        tying_setting="tie_word_embeddings",
    ),
    Family(
        backbone="RWKV7Backbone",
        attention=None,
        decoder_layers=_rwkv_layers,
        output=_before_head,
        head=_rwkv_head,
    ),
)
