"""The families of causal language models, and the way each is run.

A family on the *serving* route lets a caller supply its attention through
KerasHub's own interface for serving engines. On the *layer* route its attention
layers are lent other methods for the length of a call. Any other family is run
on *whole rows*: each block as a plain causal sequence of its own, which is right
for anything causal and costs a full forward pass per block and step.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """How one family is run.

    Attributes:
        route: `"serving"`, `"layers"` or `"rows"`.
        attention: name of a decoder layer's attention; layer route only.
        tested: what the test suite runs it as.
    """

    route: str
    attention: str = "_self_attention_layer"


FAMILIES = {
    "GemmaBackbone": Family("serving"),
    "Gemma3Backbone": Family("serving"),
    "GPT2Backbone": Family("serving"),
    "LlamaBackbone": Family("serving"),
    "Llama3Backbone": Family("serving"),
    "MistralBackbone": Family("serving"),
    "OPTBackbone": Family("serving"),
    "QwenBackbone": Family("serving"),
    "Qwen3Backbone": Family("serving"),
    "BloomBackbone": Family("layers"),
    "FalconBackbone": Family("layers", "attention_layer"),
    "Gemma3nBackbone": Family("layers", "attention"),
    "GPTNeoXBackbone": Family("layers"),
    "MixtralBackbone": Family("layers"),
    "Phi3Backbone": Family("layers", "attention"),
    "QwenMoeBackbone": Family("layers"),
    "Qwen3MoeBackbone": Family("layers"),
    "SmolLM3Backbone": Family("layers", "self_attn"),
    "Gemma4Backbone": Family("rows"),
    "GptOssBackbone": Family("rows"),
    "Qwen3_5Backbone": Family("rows"),
    "Qwen3_5MoeBackbone": Family("rows"),
    "RWKV7Backbone": Family("rows"),
}

# What KerasHub calls a CausalLM and this library cannot train, with the reason.
REFUSED = {
    "BLIP2Backbone": "it continues images, which documents of text do not have",
    "PaliGemmaBackbone": "it continues images, which documents of text do not have",
    "PARSeqBackbone": "it reads images, which documents of text do not have",
}


def family_of(backbone):
    """The `Family` of a backbone.

    Raises:
        ValueError: if it is not supported; the message says why.
    """
    name = type(backbone).__name__
    if name in FAMILIES:
        family = FAMILIES[name]
        if name == "Phi3Backbone" and backbone.rope_scaling_type is not None:
            # Its frequencies depend on the length of the sequence.
            return Family("rows")
        return family
    reason = f", because {REFUSED[name]}" if name in REFUSED else ""
    raise ValueError(
        f"Expected a backbone of a supported family: {', '.join(FAMILIES)}. "
        f"Received: {name}{reason}. Use a model of one of these families."
    )


def decoder_layers(backbone):
    """The decoder layers of a backbone, from the embeddings upwards."""
    if type(backbone).__name__ == "Gemma3nBackbone":
        return backbone.language_model.transformer_layers
    return getattr(backbone, "transformer_layers", None) or backbone.rwkv_layers


def num_layers(backbone):
    """Number of decoder layers of a backbone."""
    return len(decoder_layers(backbone))
