"""What this library asks of a KerasHub causal language model."""

import logging
from typing import Any, NamedTuple

import keras
import keras_hub
from keras import ops

from keras_ebft.backend.runtime import multiplies_mixed_dtypes
from keras_ebft.networks import adapters
from keras_ebft.networks.families import FAMILIES, family_of
from keras_ebft.networks.rematerialisation import remat_mode
from keras_ebft.networks.serving_route import check_version

logger = logging.getLogger("keras_ebft")


class OutputHead(NamedTuple):
    """The projection from final hidden states to logits.

    Attributes:
        kernel: float tensor `[V, D]`.
        soft_cap: float or `None`, cap on the logits.
    """

    kernel: Any
    soft_cap: Any


def check_supported(causal_lm):
    """Checks that a causal language model can be trained by this library.

    Raises:
        TypeError: if `causal_lm` is not a `keras_hub.models.CausalLM`.
        ValueError: if its family is not supported, or the installed KerasHub is
            not a version this library was tested with.
    """
    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise TypeError(
            "Expected `causal_lm` to be a keras_hub.models.CausalLM. Received: "
            f"{causal_lm!r} (of type {type(causal_lm).__name__}). Pass for example "
            'keras_hub.models.CausalLM.from_preset("gemma3_1b").'
        )
    check_version()
    if isinstance(causal_lm, keras_hub.models.Seq2SeqLM):
        raise ValueError(
            "Expected a decoder-only model. Received: a "
            f"{type(causal_lm).__name__}, whose decoder attends to an encoder, which "
            "no block-parallel pass runs. Use a family of these: "
            f"{', '.join(FAMILIES)}."
        )
    check_backbone(causal_lm.backbone)
    check_quantization(causal_lm.backbone)
    remat_mode(causal_lm.backbone)
    if type(causal_lm).__name__ == "Gemma4AssistantCausalLM":
        raise ValueError(
            "Expected a model that reads text by itself. Received: a "
            "Gemma4AssistantCausalLM, which drafts for another model. Train the "
            "Gemma4CausalLM it assists."
        )
    if getattr(causal_lm, "final_logit_cap", None) is not None:
        raise ValueError(
            "Expected the cap on logits in the backbone. Received: a "
            f"{type(causal_lm).__name__} with final_logit_cap="
            f"{causal_lm.final_logit_cap} of its own. Set final_logit_soft_cap of "
            "the Gemma4Backbone instead."
        )


def check_backbone(backbone):
    """Raises a `ValueError` if a backbone is not of a supported kind."""
    family = family_of(backbone)
    encoders = [
        f"{kind}_encoder"
        for kind in ("vision", "audio")
        if getattr(backbone, f"{kind}_encoder", None) is not None
    ]
    if encoders:
        raise ValueError(
            "Expected a text-only backbone. Received: a "
            f"{type(backbone).__name__} with {' and '.join(encoders)}. "
            f"{_text_only_remedy(backbone)}"
        )
    if family.route == "rows":
        logger.warning(
            "%s offers no way to share a document between blocks: every block is "
            "run as a sequence of its own, which is right but slow.",
            type(backbone).__name__,
        )


def _text_only_remedy(backbone):
    if type(backbone).__name__ == "Gemma3nBackbone":
        return (
            "Load its text model alone: keras_hub.models.Gemma3nBackbone."
            "from_preset(preset, vision_encoder_config=None, "
            "audio_encoder_config=None)."
        )
    return 'Use a text preset, for example "gemma3_1b".'


def check_quantization(backbone):
    """Checks that a quantized backbone can be trained rightly.

    Raises:
        ValueError: if quantized layers have no adapters to train, the gradient
            through quantized embeddings would be wrong, the mode is float8, or
            Keras cannot run the dtype policy on this backend.
    """
    quantized = {
        layer.path: layer
        for layer in adapters.layers_of(backbone)
        if getattr(layer, "quantization_mode", None) is not None
    }
    if not quantized:
        return
    name = type(backbone).__name__
    modes = sorted({layer.quantization_mode for layer in quantized.values()})
    if not set(modes) <= {"int8", "int4"}:
        raise ValueError(
            f"Expected quantization to int8 or int4. Received: a {name} quantized "
            f"to {', '.join(modes)}, on which Keras trains no adapters. Use "
            'causal_lm.quantize("int8", filters=...) on the unquantized model.'
        )
    embeddings = [
        path for path, la in quantized.items() if isinstance(la, keras.layers.Embedding)
    ]
    if embeddings:
        raise ValueError(
            "Expected embeddings that are not quantized: the gradient that Keras "
            "computes through them as output head is wrong. Received: a "
            f"{name} with quantized {embeddings[0]}. Quantize dense layers "
            f'only: causal_lm.quantize("{modes[0]}", filters=is_dense), with '
            "is_dense(layer) = isinstance(layer, (keras.layers.Dense, "
            "keras.layers.EinsumDense))."
        )
    if not adapters.adapted_layers(backbone):
        raise ValueError(
            "Expected adapters on a quantized model, whose own kernels cannot be "
            f"trained. Received: a {name} quantized to {modes[0]} without any. Call "
            "causal_lm.backbone.enable_lora(rank) first."
        )
    policy = dtype_policy_name(backbone)
    if policy in ("bfloat16", "float16") and not multiplies_mixed_dtypes():
        # Keras keeps adapters in float32.
        raise ValueError(
            "Expected a mixed policy, or float32, for adapters on a quantized model "
            f"on PyTorch, where Keras cannot run them otherwise. Received: a {name} "
            f"quantized to {modes[0]} with dtype={policy!r}. Load the model with "
            f"dtype='mixed_{policy}' or dtype='float32'."
        )


def dtype_policy_name(backbone):
    """Name of the Keras dtype policy that a backbone computes under."""
    compute, variable = backbone.compute_dtype, backbone.variable_dtype
    return compute if compute == variable else f"mixed_{compute}"


def check_feature_backbone(backbone, policy):
    """Raises a `ValueError` unless a backbone can read the policy's tokens."""
    check_backbone(backbone)
    sizes = vocabulary_size(backbone), vocabulary_size(policy)
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Expected the feature network's backbone to share the policy's tokenizer, "
            f"of {sizes[1]} tokens. Received: a {type(backbone).__name__} of "
            f"{sizes[0]} tokens. Use a backbone trained with the same tokenizer."
        )
    if adapters.adapted_layers(backbone):
        raise ValueError(
            "Expected a feature network without adapters. Received: a "
            f"{type(backbone).__name__} with adapters. Merge them: save it with "
            "save_to_preset() and load that."
        )


def tokenizer(causal_lm):
    """The tokenizer of a causal language model, `None` without a preprocessor."""
    return getattr(causal_lm.preprocessor, "tokenizer", None)


def end_token_ids(causal_lm):
    """Token ids that end a text, as KerasHub's `generate` takes them.

    Raises:
        ValueError: if the model has no preprocessor to know them.
    """
    known = tokenizer(causal_lm)
    if known is None:
        raise ValueError(
            'Expected a CausalLM with a preprocessor for stop_token_ids="auto". '
            "Received: one without. Pass stop_token_ids=(your end token's id,), or "
            "None for rollouts that never stop."
        )
    return _token_ids(known, "end_token_id", "end_token2_id")


def marker_token_ids(causal_lm):
    """Token ids that begin or end a text and are no part of it."""
    names = ("start_token_id", "end_token_id", "end_token2_id")
    return _token_ids(tokenizer(causal_lm), *names)


def _token_ids(known, *names):
    found = [getattr(known, name, None) for name in names]
    return tuple(int(token) for token in found if token is not None)


def output_head(backbone):
    """The `OutputHead` over a backbone, read at call time."""
    if type(backbone).__name__ == "Gemma3nBackbone":
        kernel = backbone.language_model.embed_tokens.embedding.embeddings
        return OutputHead(
            ops.reshape(kernel, kernel.shape), backbone.final_logit_soft_cap
        )
    if not hasattr(backbone.token_embedding, "tie_weights"):
        # RWKV-7's backbone ends in logits.
        return OutputHead(ops.transpose(backbone.head.kernel), None)
    embedding = backbone.token_embedding
    if embedding.tie_weights:
        # Reshaping reads the variable: TensorFlow would hand the variable itself
        # on, which its custom gradients refuse.
        kernel = ops.reshape(embedding.embeddings, embedding.embeddings.shape)
    else:
        kernel = ops.transpose(ops.convert_to_tensor(embedding.reverse_embeddings))
    return OutputHead(kernel, embedding.logit_soft_cap)


def vocabulary_size(backbone):
    """Number of token ids a backbone knows, V."""
    if type(backbone).__name__ == "Gemma3nBackbone":
        return backbone.text_vocab_size
    return backbone.token_embedding.input_dim


def maximum_length(causal_lm):
    """Tokens that learned position embeddings reach, or `None` for rotary ones."""
    backbone = causal_lm.backbone
    if not hasattr(backbone, "position_embedding"):
        return None
    return backbone.position_embedding.sequence_length
