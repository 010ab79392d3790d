"""Networks made from a backbone: the policy's own, and those that stay frozen."""

import inspect

import keras

from keras_ebft.networks import adapters, text_model
from keras_ebft.networks.families import decoder_layers, family_of, num_layers
from keras_ebft.networks.routed import RoutedNetwork, RowNetwork

# Settings with one entry per decoder layer.
PER_LAYER = (
    "activation_sparsity_pattern",
    "intermediate_size",
    "layer_types",
    "rope_layer_enabled_list",
)


def routed_backbone(backbone, rematerialize=False):
    """The whole backbone as a network that ends in final hidden states.

    Args:
        backbone: a supported KerasHub backbone.
        rematerialize: bool, whether decoder layers run again in the backward pass.

    Returns:
        `RoutedNetwork` or `RowNetwork`.
    """
    network = _network(_final_hidden(backbone), num_layers(backbone), backbone)
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
    outputs = _tapped_outputs(source, layers, num_layers(backbone))
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
    if not isinstance(copy, keras.Model):
        return list(zip(copy.variables, original.variables))
    originals = {part.name: part for part in _parts(original)}
    pairs = []
    for part in _parts(copy):
        if part.variables:
            pairs.extend(copied_variables(part, originals[part.name]))
    return pairs


def _parts(network):
    """The layers of a network, some of which a copy lacks."""
    if type(network).__name__ == "Gemma3nBackbone":
        text = network.language_model
        return text._flatten_layers(recursive=False, include_self=False)
    return network.layers


def leading(array, shape):
    """The part of an array that belongs to the lower layers a copy has.

    Gemma 3n and Gemma 4 keep what all layers read of a token side by side.

    Args:
        array: array or tensor.
        shape: shape of the copy's variable.
    """
    return array[tuple(slice(size) for size in shape)]


def _network(model, num_layers, backbone, switched_off=()):
    family = family_of(backbone)
    if family.route == "rows":
        return RowNetwork(model, num_layers, backbone, switched_off)
    return RoutedNetwork(model, num_layers, backbone, family, switched_off)


def _copy(backbone, kept, with_head, name):
    config = backbone.get_config()
    known = inspect.signature(type(backbone)).parameters
    config["num_layers" if "num_layers" in known else "num_hidden_layers"] = kept
    for setting in PER_LAYER:
        if isinstance(config.get(setting), (list, tuple)):
            config[setting] = config[setting][:kept]
    if config.get("num_kv_shared_layers"):
        # The uppermost layers, which attend to keys and values from below.
        own = num_layers(backbone) - config["num_kv_shared_layers"]
        config["num_kv_shared_layers"] = max(0, kept - own)
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
        variable.assign(leading(original.numpy(), variable.shape))
    return copy


def _tapped_outputs(source, layers, last):
    """Outputs after some layers; `last` is the last one of the whole backbone."""
    if type(source).__name__ == "Gemma3nBackbone":
        return text_model.tapped_outputs(source, layers, last)
    return [
        _final_hidden(source).output
        if index == last
        else _layer_output(decoder_layers(source)[index - 1])
        for index in layers
    ]


def _layer_output(layer):
    # Some families' layers return more than the hidden states.
    return layer.output[0] if isinstance(layer.output, (list, tuple)) else layer.output


def _final_hidden(backbone):
    """A model of the backbone that ends where the output head begins."""
    if hasattr(backbone, "head"):
        # RWKV-7's backbone ends in logits.
        return keras.Model(backbone.input, backbone.head.input)
    return backbone
