"""The record that says everything this library asks of a family.

Its defaults are what most backbones of KerasHub have in common; the files beside
this one say where a family differs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops


class OutputHead(NamedTuple):
    """The projection from final hidden states to logits.

    Attributes:
        kernel: float tensor `[V, D]`.
        soft_cap: float or `None`, cap on the logits.
    """

    kernel: Any
    soft_cap: Any


def transformer_layers(backbone):
    """The decoder layers, from the embeddings upwards."""
    return backbone.transformer_layers


def embedding_of_graph(backbone, num_layers):
    """What runs below the first decoder layer, cut out of the backbone's graph."""
    given = [id(tensor) for tensor in backbone.input.values()]
    read = backbone.transformer_layers[0].input
    embedded = next(tensor for tensor in read if id(tensor) not in given)
    model = keras.Model(backbone.input, embedded)

    def embed(token_ids, positions):
        mask = ops.ones_like(token_ids)
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        return model(inputs, training=False), [mask] * num_layers

    return embed


def call_with_decoder_mask(decoder, x, padding_mask):
    """One decoder layer as most backbones call theirs."""
    return decoder(x, decoder_padding_mask=padding_mask, training=False)


def call_with_mask(decoder, x, padding_mask):
    """One decoder layer of the Gemmas."""
    return decoder(x, padding_mask=padding_mask, training=False)


def same_hidden(backbone, x):
    """Where one tensor runs from layer to layer, it is the hidden state."""
    return x


def layer_norm(backbone):
    """The normalisation after the last decoder layer."""
    return backbone.layer_norm


def output_of_graph(backbone):
    """The symbolic tensor that the output head reads."""
    return backbone.output


def reported_window(decoder, reported):
    """The sliding window that the route reports."""
    return reported


def head_of_embedding(backbone):
    """The output head of a `ReversibleEmbedding`, tied or not."""
    embedding = backbone.token_embedding
    if embedding.tie_weights:
        # Reshaping reads the variable: TensorFlow would hand the variable itself
        # on, which its custom gradients refuse.
        kernel = ops.reshape(embedding.embeddings, embedding.embeddings.shape)
    else:
        kernel = ops.transpose(ops.convert_to_tensor(embedding.reverse_embeddings))
    return OutputHead(kernel, embedding.logit_soft_cap)


def size_of_embedding(backbone):
    """Number of token ids, V."""
    return backbone.token_embedding.input_dim


def unlimited(backbone):
    """Positions are not learned: rows may be of any length."""
    return None


def layers_of_graph(backbone):
    """The layers whose variables a copy has too, some of them perhaps."""
    return backbone.layers


def never(backbone):
    """No setting asks for it."""
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Everything this library asks of one family.

    Functions of a `backbone` take a KerasHub backbone of the family; `decoder` is one
    of its decoder layers. `x` is what runs from layer to layer: `[tokens, 1, D]`.

    Attributes:
        backbone: str, the class in `keras_hub.models`.
        attention: how a caller supplies the attention of one decoder layer:
            `attention(decoder, attend, positions)` is a context in which calling
            `decoder` calls `attend(query, key, value, scale, sliding_window=None,
            soft_cap=None)`, once, with tensors `[tokens, ..., heads, head_dim]`; it
            returns the output in the query's shape. `None`: the family runs on whole
            rows only.
        only_rows: function of a backbone, whether its settings allow whole rows only.
        embedding: `embedding(backbone, num_layers)` returns a function
            `embed(token_ids, positions) -> (x, given)`, with one entry of `given` for
            each layer that will run.
        decoder_layers: function of a backbone, list of layers from below.
        layer: `layer(decoder, x, given) -> x`, one decoder layer.
        repeated: bool, whether all decoder layers of a backbone are alike but for their
            weights.
        hidden: `hidden(backbone, x)`, the hidden state `[tokens, 1, D]` in `x`.
        final_norm: function of a backbone, the layer after the last decoder layer.
        window: `window(decoder, reported)`, int or `None`: the sliding window of the
            plain forward pass, which is what `generate` and `predict` run.
        output: function of a backbone, the symbolic final hidden states.
        tapped: `tapped(backbone, layers)`, symbolic hidden states after some layers;
            `None`: those of the backbone's graph.
        head: function of a backbone, `OutputHead`, read at call time.
        vocabulary_size: function of a backbone, int.
        maximum_length: function of a backbone, int or `None`.
        text_only: str, how to load the text model of a preset that also has encoders.
        parts: function of a backbone, the layers by whose names copies are matched.
        depth_setting: str, the setting with the number of decoder layers.
        per_layer_settings: tuple of str, settings with one entry per decoder layer.
        shared_setting: str or `None`, the setting with the number of uppermost layers
            that attend to keys and values from below.
        tying_setting: str or `None`, the setting that ties the output projection.
        prompts_apart: bool, whether the preprocessor wants prompts and responses.
        layout: str or `None`, the Hugging Face layout in `export.layouts`.
    """

    backbone: str

    attention: Callable | None
    only_rows: Callable = never
    embedding: Callable = embedding_of_graph
    decoder_layers: Callable = transformer_layers
    layer: Callable = call_with_decoder_mask
    repeated: bool = False
    hidden: Callable = same_hidden
    final_norm: Callable = layer_norm
    window: Callable = reported_window

    output: Callable = output_of_graph
    tapped: Callable | None = None
    head: Callable = head_of_embedding
    vocabulary_size: Callable = size_of_embedding
    maximum_length: Callable = unlimited
    text_only: str = 'Use a text preset, for example "gemma3_1b".'

    parts: Callable = layers_of_graph
    depth_setting: str = "num_layers"
    per_layer_settings: tuple = ()
    shared_setting: str | None = None
    tying_setting: str | None = None

    prompts_apart: bool = False
    layout: str | None = None

    @property
    def route(self):
        """`"serving"`, `"patched"` or `"rows"`: how attention is reached."""
        return "rows" if self.attention is None else self.attention.route

    def for_backbone(self, backbone):
        """The record of one backbone, some of whose settings may allow rows only."""
        if self.only_rows(backbone):
            return dataclasses.replace(self, attention=None)
        return self

    def tapped_outputs(self, backbone, layers, depth):
        """Symbolic hidden states after some layers.

        Args:
            backbone: backbone, some upper layers of which may be missing.
            layers: increasing list of ints from 1.
            depth: int, the layer that is tapped after the final normalisation.

        Returns:
            list of Keras tensors `[B, T, D]`.
        """
        if self.tapped is not None:
            return self.tapped(backbone, layers, depth)
        decoders = self.decoder_layers(backbone)
        return [
            self.output(backbone) if index == depth else _output(decoders[index - 1])
            for index in layers
        ]


def _output(decoder):
    # Some families' layers return more than the hidden states.
    outputs = decoder.output
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs
