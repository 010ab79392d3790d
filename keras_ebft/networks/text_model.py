"""Gemma 3n's decoder, layer by layer.

KerasHub keeps its decoder layers within one layer, of which a `keras.Model` could
tap nothing but the end. Here the same layers are called one after another.

Between them several streams `[S, B, T, D]` run side by side. What this library
calls a hidden state is what the network itself makes of them at its end: the first
stream and each other one projected and brought to the first one's magnitude,
averaged.
"""

from keras import ops

SMALLEST_SQUARE = 1e-5


def tapped_outputs(backbone, layers, last):
    """Hidden states after some decoder layers.

    Args:
        backbone: `keras_hub.models.Gemma3nBackbone` without image and audio encoders.
        layers: increasing list of ints; layer 1 is the first decoder layer.
        last: int, the layer that is tapped after the final normalisation.

    Returns:
        list of Keras tensors `[B, T, D]`, outputs of `backbone.input`.
    """
    model = backbone.language_model
    token_ids, padding_mask = backbone.input
    embedded = model.embed_tokens(token_ids)
    streams = _split(model, embedded)
    layer_inputs = _layer_inputs(backbone, token_ids, embedded, layers[-1])
    # The last layers attend to keys and values of the last one of their kind
    # that has its own.
    shared, outputs = {}, []
    for index, layer in enumerate(model.transformer_layers[: layers[-1]]):
        kind = model.layer_types[index]
        borrowed = shared.get(kind) if layer.is_kv_shared_layer else None
        inputs = (streams, layer_inputs[index], padding_mask)
        streams, keys_values = layer(inputs, cache=borrowed)
        if not layer.is_kv_shared_layer:
            shared[kind] = keys_values
        if index + 1 in layers:
            outputs.append(_merge(model, streams))
    if layers[-1] == last:
        outputs[-1] = model.final_normalization(outputs[-1])
    return outputs


def _split(model, embedded):
    """The streams that the first layer reads."""
    projected = [project(embedded) for project in model.altup_projections]
    return ops.stack([embedded, *(_as_large_as(embedded, p) for p in projected)])


def _merge(model, streams):
    """The streams as one hidden state."""
    first, others = streams[0], model.altup_unembed_projections
    projected = [project(streams[i]) for i, project in enumerate(others, start=1)]
    return ops.mean(
        ops.stack([first, *(_as_large_as(first, p) for p in projected)]), axis=0
    )


def _as_large_as(reference, x):
    """`x` scaled to the root mean square of `reference`, token by token."""
    wanted, found = (
        ops.mean(ops.square(value), axis=-1, keepdims=True) for value in (reference, x)
    )
    return x * ops.sqrt(wanted) / ops.sqrt(ops.maximum(found, SMALLEST_SQUARE))


def _layer_inputs(backbone, token_ids, embedded, num_layers):
    """What each layer reads of a token next to the streams, list of `[B, T, P]`."""
    model = backbone.language_model
    known = token_ids < backbone.vocab_size_per_layer_input
    tokens = model.embed_tokens_per_layer(ops.where(known, token_ids, 0))
    # Divided: Keras takes the product of a symbolic tensor and a number for sparse.
    projected = model.per_layer_model_projection(embedded) / model.hidden_size**0.5
    width = model.hidden_size_per_layer_input
    found = []
    for index in range(num_layers):
        # Slices, where a reshape would need to know the batch.
        own = slice(index * width, (index + 1) * width)
        normalised = model.per_layer_projection_norm(projected[..., own])
        found.append((normalised + tokens[..., own]) / 2**0.5)
    return found
