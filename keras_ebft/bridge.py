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

from keras_ebft import adapters

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
        switched_off: list of layers whose adapters take no part.
    """

    def __init__(self, model, num_layers, honours_window, switched_off=()):
        self.model = model
        self.num_layers = num_layers
        self.honours_window = honours_window
        self.switched_off = switched_off

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
        with (
            adapters.switched_off(self.switched_off),
            _attention_route()(routed, ops.reshape(positions, (-1,)), caches),
        ):
            # What is trained and embedded is what was sampled from: no dropout,
            # which TensorFlow would take from the surrounding train step.
            outputs = self.model(
                {"token_ids": tokens, "padding_mask": ops.ones_like(tokens)},
                training=False,
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
    backbone = causal_lm.backbone
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
    return RoutedNetwork(backbone, backbone.num_layers, _honours_window(backbone))


def output_head(causal_lm):
    """The `OutputHead` of a causal language model, read at call time."""
    embedding = causal_lm.backbone.token_embedding
    if embedding.tie_weights:
        # Reshaping reads the variable: TensorFlow would hand the variable itself
        # on, which its custom gradients refuse.
        kernel = ops.reshape(embedding.embeddings, embedding.embeddings.shape)
    else:
        kernel = ops.transpose(ops.convert_to_tensor(embedding.reverse_embeddings))
    return OutputHead(kernel, embedding.logit_soft_cap)


def vocabulary_size(causal_lm):
    """Number of token ids the model knows, V."""
    return causal_lm.backbone.token_embedding.input_dim


def maximum_length(causal_lm):
    """Tokens that learned position embeddings reach, or `None` for rotary ones."""
    return getattr(causal_lm.backbone, "max_sequence_length", None)


def frozen_taps(backbone, layers):
    """The lower part of a backbone as it is now, tapped after some layers.

    Layers above the last tap take no part. With adapters the network is the
    backbone's own weights without them, which training leaves alone; otherwise a
    frozen copy.

    Args:
        backbone: a supported KerasHub backbone.
        layers: increasing list of ints; layer 1 is the first decoder layer.

    Returns:
        `RoutedNetwork` whose outputs are a list with one hidden state per tap.
    """
    adapted = adapters.adapted_layers(backbone)
    if adapted:
        model = _tapped(backbone, layers)
        return RoutedNetwork(model, layers[-1], _honours_window(backbone), adapted)
    model = _tapped(_frozen_copy(backbone, layers[-1]), layers)
    model.trainable = False
    return RoutedNetwork(model, layers[-1], _honours_window(backbone))


def _tapped(backbone, layers):
    outputs = [backbone.transformer_layers[index - 1].output for index in layers]
    return keras.Model(backbone.input, outputs, name="frozen_network")


def _frozen_copy(backbone, num_layers):
    config = {**backbone.get_config(), "num_layers": num_layers}
    if "tie_word_embeddings" in inspect.signature(type(backbone)).parameters:
        # No logits come from the copy: it needs no output projection of its own.
        config["tie_word_embeddings"] = True
    # Keras finds a PyTorch parameter by its variable's path: without a scope of
    # its own the copy would take the place of the trained weights.
    with keras.name_scope("frozen_network"):
        copy = type(backbone).from_config(config)
    for layer in copy.layers:
        source = backbone.get_layer(layer.name)
        if layer is copy.token_embedding:
            layer.embeddings.assign(source.embeddings.numpy())
        else:
            layer.set_weights(source.get_weights())
    return copy


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
