"""Networks made from a backbone: the policy's own, and those that stay frozen."""

import inspect

import keras

from keras_ebft import adapters
from keras_ebft.bridge.families import decoder_layers, family_of
from keras_ebft.bridge.networks import RoutedNetwork, RowNetwork


def routed_backbone(backbone, rematerialize=False):
    """The whole backbone as a network that ends in final hidden states.

    Args:
        backbone: a supported KerasHub backbone.
        rematerialize: bool, whether decoder layers run again in the backward pass.

    Returns:
        `RoutedNetwork` or `RowNetwork`.
    """
    network = _network(_final_hidden(backbone), backbone.num_layers, backbone)
    network.rematerialize = rematerialize
    return network


def frozen_taps(backbone, layers, with_head=False, name="frozen_network"):
    """The lower part of a backbone as it is now, tapped after some layers.

    Layers above the last tap take no part. With adapters the network is the
    backbone's own weights without them, which training leaves alone; otherwise it
    is a frozen copy.

    Args:
        backbone: a supported KerasHub backbone.
        layers: increasing list of ints; layer 1 is the first decoder layer, and
            the last layer is tapped after the final normalisation.
        with_head: bool, whether the output projection is copied too.
        name: str, scope of the copy's variables.

    Returns:
        `RoutedNetwork` or `RowNetwork` whose outputs are a list with one hidden
        state per tap.
    """
    adapted = adapters.adapted_layers(backbone)
    source = backbone if adapted else _copy(backbone, layers[-1], with_head, name)
    outputs = [
        _final_hidden(source).output
        if index == backbone.num_layers
        else _layer_output(decoder_layers(source)[index - 1])
        for index in layers
    ]
    model = keras.Model(source.input, outputs, name=name)
    if not adapted:
        model.trainable = False
    return _network(model, layers[-1], source, adapted)


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


def _network(model, num_layers, backbone, switched_off=()):
    family = family_of(backbone)
    if family.route == "rows":
        return RowNetwork(model, num_layers, backbone, switched_off)
    return RoutedNetwork(model, num_layers, backbone, family, switched_off)


def _copy(backbone, num_layers, with_head, name):
    config = {**backbone.get_config(), "num_layers": num_layers}
    known = inspect.signature(type(backbone)).parameters
    for setting in ("layer_types", "rope_layer_enabled_list"):
        if config.get(setting) is not None:
            config[setting] = config[setting][:num_layers]
    if "tie_word_embeddings" in known:
        # Without logits the copy needs no output projection of its own. (Llama 3's
        # own configuration does not say whether it has one.)
        tied = backbone.token_embedding.tie_weights
        config["tie_word_embeddings"] = tied or not with_head
    # Keras finds a PyTorch parameter by its variable's path: without a scope of
    # its own the copy would take the place of the trained weights.
    with keras.name_scope(name):
        copy = type(backbone).from_config(config)
    for variable, original in copied_variables(copy, backbone):
        # By way of NumPy: `assign` may share a buffer, which JAX then donates.
        variable.assign(original.numpy())
    return copy


def _layer_output(layer):
    # Some families' layers return more than the hidden states.
    return layer.output[0] if isinstance(layer.output, (list, tuple)) else layer.output


def _final_hidden(backbone):
    """A model of the backbone that ends where the output head begins."""
    if hasattr(backbone, "head"):
        # RWKV-7's backbone ends in logits.
        return keras.Model(backbone.input, backbone.head.input)
    return backbone
