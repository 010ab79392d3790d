"""The one door into KerasHub: routed attention, output heads, sub-networks.

KerasHub lets a serving engine supply the attention of a forward pass, with one
position per token. That route carries block-parallel passes, gradients
included. It is private API, so this module is the only one that imports
`keras_hub.src`, and it checks the version it was tested with.
"""

import inspect
from typing import Any, NamedTuple

import keras
import keras_hub
from keras import ops

TESTED_VERSIONS = ("0.32",)

FAMILIES = (
    "GemmaBackbone",
    "Gemma3Backbone",
    "GPT2Backbone",
    "LlamaBackbone",
    "Llama3Backbone",
    "MistralBackbone",
    "OPTBackbone",
    "QwenBackbone",
    "Qwen3Backbone",
)
# Their plain forward pass attends to everything where it runs fused attention (JAX
# and PyTorch), although the route reports a sliding window. What is trained must be
# what `generate` and `predict` run.
WINDOWLESS_WHEN_FUSED = ("QwenBackbone", "Qwen3Backbone")


class OutputHead(NamedTuple):
    """The projection from final hidden states to logits.

    Attributes:
        kernel: float tensor `[V, D]`.
        soft_cap: float or `None`, cap on the logits.
    """

    kernel: Any
    soft_cap: Any


class RoutedNetwork:
    """A backbone, or the lower part of one, whose attention the caller supplies.

    Args:
        model: `keras.Model` that maps a backbone's inputs to hidden states.
        num_layers: int, decoder layers in `model`.
        honours_window: bool, whether reported sliding windows are applied.
        backbone: the backbone whose layers these are.
    """

    def __init__(self, model, num_layers, honours_window, backbone):
        self.model = model
        self.num_layers = num_layers
        self.honours_window = honours_window
        self.backbone = backbone

    def __call__(self, token_ids, positions, attend, caches=None):
        """Runs the network on independent tokens; `attend` connects them.

        Args:
            token_ids: int32 tensor of any static shape.
            positions: int32 tensor of the same shape, position ids.
            attend: function `(query, key, value, cache, *, scale,
                sliding_window, soft_cap) -> (output, cache)`, called once per
                layer with `[*shape, heads, head_dim]` tensors.
            caches: list with one entry per layer, handed to `attend`.

        Returns:
            `(outputs, caches)`: the model's outputs with the leading axes of
            `token_ids`, and the caches `attend` returned.

        Raises:
            ValueError: if attention did not pass through `attend` once per layer.
        """
        shape = tuple(token_ids.shape)
        updated = []

        def routed(
            cache,
            query,
            key,
            value,
            scale,
            head_dim,
            num_heads,
            num_kv_heads,
            sliding_window=None,
            soft_cap=None,
        ):
            output, cache = attend(
                ops.reshape(query, (*shape, num_heads, head_dim)),
                ops.reshape(key, (*shape, num_kv_heads, head_dim)),
                ops.reshape(value, (*shape, num_kv_heads, head_dim)),
                cache,
                scale=scale,
                sliding_window=sliding_window if self.honours_window else None,
                soft_cap=soft_cap,
            )
            updated.append(cache)
            return cache, ops.reshape(output, (-1, num_heads * head_dim))

        tokens = ops.reshape(token_ids, (-1, 1))
        caches = [None] * self.num_layers if caches is None else caches
        with _attention_route()(routed, ops.reshape(positions, (-1,)), caches):
            outputs = self.model(
                {"token_ids": tokens, "padding_mask": ops.ones_like(tokens)}
            )
        if len(updated) != self.num_layers:
            raise ValueError(
                f"Expected attention to be routed once in each of {self.num_layers} "
                f"layers. Received: {len(updated)} routed calls. This backbone does "
                "not offer the attention route; use a family this library supports: "
                f"{', '.join(FAMILIES)}."
            )
        outputs = keras.tree.map_structure(
            lambda output: ops.reshape(output, (*shape, output.shape[-1])), outputs
        )
        return outputs, updated


def check_supported(causal_lm):
    """Checks that a causal language model can be trained by this library.

    Raises:
        TypeError: if `causal_lm` is not a `keras_hub.models.CausalLM`.
        ValueError: if its backbone family is not supported, or the installed
            KerasHub is not a version this library was tested with.
    """
    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise TypeError(
            "Expected `causal_lm` to be a keras_hub.models.CausalLM. Received: "
            f"{causal_lm!r} (of type {type(causal_lm).__name__}). Pass for example "
            'keras_hub.models.CausalLM.from_preset("gemma3_1b").'
        )
    _attention_route()
    _check_backbone(causal_lm.backbone)


def _check_backbone(backbone):
    if type(backbone).__name__ not in FAMILIES:
        raise ValueError(
            "Expected a backbone of a supported family: "
            f"{', '.join(FAMILIES)}. Received: {type(backbone).__name__}. "
            "Use a model of one of these families."
        )
    if getattr(backbone, "vision_encoder", None) is not None:
        raise ValueError(
            "Expected a text-only backbone. Received: a "
            f"{type(backbone).__name__} with a vision encoder. Use a text preset, "
            'for example "gemma3_1b".'
        )


def routed_backbone(backbone):
    """The whole backbone as a `RoutedNetwork` that ends in final hidden states."""
    return RoutedNetwork(
        backbone, backbone.num_layers, _honours_window(backbone), backbone
    )


def output_head(backbone):
    """The `OutputHead` over a backbone, read at call time."""
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
    return backbone.token_embedding.input_dim


def check_feature_backbone(backbone, policy):
    """Raises a `ValueError` unless a backbone can read the policy's tokens."""
    _check_backbone(backbone)
    sizes = vocabulary_size(backbone), vocabulary_size(policy)
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Expected the feature network's backbone to share the policy's tokenizer, "
            f"of {sizes[1]} tokens. Received: a {type(backbone).__name__} of "
            f"{sizes[0]} tokens. Use a backbone trained with the same tokenizer."
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
    names = ("end_token_id", "end_token2_id")
    found = [getattr(known, name, None) for name in names]
    return tuple(int(token) for token in found if token is not None)


def maximum_length(causal_lm):
    """Tokens that learned position embeddings reach, or `None` for rotary ones."""
    return getattr(causal_lm.backbone, "max_sequence_length", None)


def frozen_taps(backbone, layers, with_head=False, name="frozen_network"):
    """A frozen copy of the lower part of a backbone, tapped after some layers.

    Layers above the last tap are not copied. Later changes of `backbone` leave
    the copy alone.

    Args:
        backbone: a supported KerasHub backbone.
        layers: increasing list of ints; layer 1 is the first decoder layer, and
            the last layer is tapped after the final normalisation.
        with_head: bool, whether the output projection is copied too.
        name: str, scope of the copy's variables.

    Returns:
        `RoutedNetwork` whose outputs are a list with one hidden state per tap.
    """
    config = {**backbone.get_config(), "num_layers": layers[-1]}
    if "tie_word_embeddings" in inspect.signature(type(backbone)).parameters:
        # Without logits the copy needs no output projection of its own. (Llama 3's
        # own configuration does not say whether it has one.)
        tied = backbone.token_embedding.tie_weights
        config["tie_word_embeddings"] = tied or not with_head
    # Keras finds a PyTorch parameter by its variable's path: without a scope of
    # its own the copy would take the place of the trained weights.
    with keras.name_scope(name):
        copy = type(backbone).from_config(config)
    for layer in copy.layers:
        source = backbone.get_layer(layer.name)
        for variable, original in copied_variables(layer, source):
            # By way of NumPy: `assign` may share a buffer, which JAX then donates.
            variable.assign(original.numpy())
    outputs = [
        copy.output
        if index == backbone.num_layers
        else copy.transformer_layers[index - 1].output
        for index in layers
    ]
    model = keras.Model(copy.input, outputs, name=name)
    model.trainable = False
    return RoutedNetwork(model, layers[-1], _honours_window(backbone), copy)


def copied_variables(copy, original):
    """Pairs of variables of a frozen copy and of what it was copied from.

    Args:
        copy: layer or model; may lack an output projection and upper layers.
        original: the layer or model of the same names.
    """
    if isinstance(copy, keras.Model):
        pairs = []
        for layer in copy.layers:
            pairs.extend(copied_variables(layer, original.get_layer(layer.name)))
        return pairs
    return list(zip(copy.variables, original.variables))


def _honours_window(backbone):
    from keras_hub.src.utils.keras_utils import fused_attention_op_available

    windowless = type(backbone).__name__ in WINDOWLESS_WHEN_FUSED
    return not (windowless and fused_attention_op_available())


def _attention_route():
    """KerasHub's attention route, or a clear error about the version."""
    version = keras_hub.__version__
    if not version.startswith(TESTED_VERSIONS):
        raise ValueError(
            "keras_ebft routes attention through a part of KerasHub that was "
            f"tested with versions {', '.join(TESTED_VERSIONS)}. Received: "
            f"keras-hub {version}. Install a tested version: "
            f'pip install "keras-hub=={TESTED_VERSIONS[-1]}.*"'
        )
    from keras_hub.src.vllm.context import vllm_context_scope

    return vllm_context_scope
