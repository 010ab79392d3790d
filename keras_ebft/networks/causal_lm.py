"""What this library asks of a KerasHub causal language model."""

import logging
from typing import Any

import keras_hub

from keras_ebft.networks import adapters
from keras_ebft.networks.families import FAMILIES, REFUSED_MODELS, OutputHead, family_of
from keras_ebft.networks.quantization import check_quantization
from keras_ebft.networks.rematerialisation import remat_mode
from keras_ebft.networks.versions import check_versions

logger = logging.getLogger("keras_ebft")


def check_supported(causal_lm: keras_hub.models.CausalLM) -> None:
    """Checks that a causal language model can be trained by this library.

    Raises:
        TypeError: if `causal_lm` is not a `keras_hub.models.CausalLM`.
        ValueError: if its family is not supported, or the installed Keras or KerasHub
            is not a version this library was tested with.
    """
    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise TypeError(
            "Expected `causal_lm` to be a keras_hub.models.CausalLM. Received: "
            f"{causal_lm!r} (of type {type(causal_lm).__name__}). Pass for example "
            'keras_hub.models.CausalLM.from_preset("gemma3_1b").'
        )
    check_versions()
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
    name = type(causal_lm).__name__
    if name in REFUSED_MODELS:
        raise ValueError(
            f"Expected a model that reads text by itself. Received: a {name}: "
            f"{REFUSED_MODELS[name]}."
        )
    if getattr(causal_lm, "final_logit_cap", None) is not None:
        raise ValueError(
            f"Expected the cap on logits in the backbone. Received: a {name} with "
            f"final_logit_cap={causal_lm.final_logit_cap} of its own. Set "
            f"final_logit_soft_cap of the {type(causal_lm.backbone).__name__} instead."
        )


def check_backbone(backbone: keras_hub.models.Backbone) -> None:
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
            f"{family.text_only}"
        )
    if family.attention is None:
        logger.warning(
            "%s offers no way to share a document between blocks: every block is "
            "run as a sequence of its own, which is right but slow.",
            type(backbone).__name__,
        )


def check_feature_backbone(
    backbone: keras_hub.models.Backbone, policy: keras_hub.models.Backbone
) -> None:
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


def tokenizer(
    causal_lm: keras_hub.models.CausalLM,
) -> keras_hub.tokenizers.Tokenizer | None:
    """The tokenizer of a causal language model, `None` without a preprocessor."""
    return getattr(causal_lm.preprocessor, "tokenizer", None)


def end_token_ids(causal_lm: keras_hub.models.CausalLM) -> tuple[int, ...]:
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


def _token_ids(known: Any, *names: str) -> tuple[int, ...]:
    token_ids = [getattr(known, name, None) for name in names]
    return tuple(int(token) for token in token_ids if token is not None)


def output_head(backbone: keras_hub.models.Backbone) -> OutputHead:
    """The `OutputHead` over a backbone, read at call time."""
    return family_of(backbone).head(backbone)


def vocabulary_size(backbone: keras_hub.models.Backbone) -> int:
    """Number of token ids a backbone knows, V."""
    return family_of(backbone).vocabulary_size(backbone)


def maximum_length(causal_lm: keras_hub.models.CausalLM) -> int | None:
    """Tokens that learned position embeddings reach, or `None` for other positions."""
    return family_of(causal_lm.backbone).maximum_length(causal_lm.backbone)
