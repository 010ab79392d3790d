"""Gemma 3n, whose decoder layers lie within one layer of KerasHub's.

Several streams `[S, tokens, 1, D]` run from layer to layer, side by side; each layer
also reads a vector of its own for every token, and the uppermost ones attend to keys
and values of the last one of their kind that has its own. What this library calls a
hidden state is what the network itself makes of the streams at its end: the first one
and each other one projected and brought to the first one's magnitude, averaged.
"""

import functools
from typing import Any, NamedTuple

from keras import ops

from keras_ebft.networks.families.family import Family, OutputHead
from keras_ebft.networks.families.patched import PatchedAttention
from keras_ebft.networks.patches import Patch

SMALLEST_SQUARE = 1e-5


class Streams(NamedTuple):
    """What runs from layer to layer.

    Attributes:
        hidden: float tensor `[S, B, T, D]`.
        shared: dict from a kind of layer to the keys and values that layers of this
            kind above may attend to.
    """

    hidden: Any
    shared: dict


class Given(NamedTuple):
    """What one layer reads besides the streams.

    Attributes:
        inputs: float tensor `[B, T, P]`, the layer's own of every token.
        padding_mask: bool tensor `[B, T]`.
        kind: str, `"full_attention"` or `"sliding_attention"`.
    """

    inputs: Any
    padding_mask: Any
    kind: str


def attention_patches(decoder, attend, positions):
    """Heads come before tokens, and two results are expected."""
    attention = decoder.attention
    rotary = attention.rotary_embedding

    def compute_attention(query, key, value, *_, **__):
        query, key, value = (ops.swapaxes(t, 1, 2) for t in (query, key, value))
        # Queries and keys are normalised; nothing scales their products.
        return attend(query, key, value, 1.0), None

    return [
        Patch(rotary, "call", functools.partial(rotary.call, positions=positions)),
        Patch(attention, "_compute_attention", compute_attention),
    ]


def embedding(backbone, num_layers):
    """What runs below the first decoder layer; see `Family.embedding`."""

    def embed(token_ids, positions):
        mask = ops.ones_like(token_ids, dtype="bool")
        return embedded(backbone, num_layers, token_ids, mask)

    return embed


def embedded(backbone, num_layers, token_ids, padding_mask):
    """`(Streams, given)`: what the first layer reads, and a `Given` per layer."""
    model = backbone.language_model
    first = model.embed_tokens(token_ids)
    projected = [project(first) for project in model.altup_projections]
    hidden = ops.stack([first, *(_as_large_as(first, p) for p in projected)])
    inputs = _inputs_per_layer(backbone, num_layers, token_ids, first)
    given = [
        Given(own, padding_mask, kind) for own, kind in zip(inputs, model.layer_types)
    ]
    return Streams(hidden, {}), given


def call_layer(decoder, streams, given):
    """One decoder layer."""
    borrowed = None
    if decoder.is_kv_shared_layer:
        borrowed = streams.shared.get(given.kind)
    hidden, keys_values = decoder(
        (streams.hidden, given.inputs, given.padding_mask),
        cache=borrowed,
        training=False,
    )
    shared = streams.shared
    if not decoder.is_kv_shared_layer:
        shared = {**shared, given.kind: keys_values}
    return Streams(hidden, shared)


def hidden_state(backbone, streams):
    """The streams as one hidden state."""
    first = streams.hidden[0]
    others = backbone.language_model.altup_unembed_projections
    projected = [project(streams.hidden[i]) for i, project in enumerate(others, 1)]
    return ops.mean(
        ops.stack([first, *(_as_large_as(first, p) for p in projected)]), axis=0
    )


def tapped(backbone, layers, depth):
    """Symbolic hidden states after some layers; see `Family.tapped_outputs`."""
    streams, given = embedded(backbone, layers[-1], *backbone.input)
    outputs = []
    for index, decoder in enumerate(decoder_layers(backbone)[: layers[-1]], start=1):
        streams = call_layer(decoder, streams, given[index - 1])
        if index in layers:
            outputs.append(hidden_state(backbone, streams))
    if layers[-1] == depth:
        outputs[-1] = final_norm(backbone)(outputs[-1])
    return outputs


def decoder_layers(backbone):
    """The decoder layers, from the embeddings upwards."""
    return backbone.language_model.transformer_layers


def final_norm(backbone):
    """The normalisation after the last decoder layer."""
    return backbone.language_model.final_normalization


def window(decoder, reported):
    """The sliding window of a layer, `None` where it sees everything."""
    return decoder.attention.sliding_window


def head(backbone):
    """The output head, which is the embedding."""
    kernel = backbone.language_model.embed_tokens.embedding.embeddings
    return OutputHead(ops.reshape(kernel, kernel.shape), backbone.final_logit_soft_cap)


def vocabulary_size(backbone):
    """Number of token ids, V."""
    return backbone.text_vocab_size


def parts(backbone):
    """The layers of the text model."""
    text = backbone.language_model
    return text._flatten_layers(recursive=False, include_self=False)


def _as_large_as(reference, x):
    """`x` scaled to the root mean square of `reference`, token by token."""
    wanted, present = (
        ops.mean(ops.square(value), axis=-1, keepdims=True) for value in (reference, x)
    )
    return x * ops.sqrt(wanted) / ops.sqrt(ops.maximum(present, SMALLEST_SQUARE))


def _inputs_per_layer(backbone, num_layers, token_ids, first):
    """What each layer reads of a token next to the streams, list of `[B, T, P]`."""
    model = backbone.language_model
    known = token_ids < backbone.vocab_size_per_layer_input
    tokens = model.embed_tokens_per_layer(ops.where(known, token_ids, 0))
    # Divided: Keras takes the product of a symbolic tensor and a number for sparse.
    projected = model.per_layer_model_projection(first) / model.hidden_size**0.5
    width = model.hidden_size_per_layer_input
    inputs = []
    for index in range(num_layers):
        # Slices, where a reshape would need to know the batch.
        own = slice(index * width, (index + 1) * width)
        normalised = model.per_layer_projection_norm(projected[..., own])
        inputs.append((normalised + tokens[..., own]) / 2**0.5)
    return inputs


FAMILIES = (
    Family(
        backbone="Gemma3nBackbone",
        attention=PatchedAttention(attention_patches),
        embedding=embedding,
        decoder_layers=decoder_layers,
        layer=call_layer,
        hidden=hidden_state,
        final_norm=final_norm,
        window=window,
        tapped=tapped,
        head=head,
        vocabulary_size=vocabulary_size,
        text_only="Load its text model alone: keras_hub.models.Gemma3nBackbone."
        "from_preset(preset, vision_encoder_config=None, "
        "audio_encoder_config=None).",
        parts=parts,
        depth_setting="num_hidden_layers",
        per_layer_settings=(
            "activation_sparsity_pattern",
            "intermediate_size",
            "layer_types",
        ),
        shared_setting="num_kv_shared_layers",
        prompts_apart=True,
    ),
)
