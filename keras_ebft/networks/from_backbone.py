"""Networks made from a backbone: the policy's own, and those that stay frozen."""

import keras

from keras_ebft.backend.distribution import layouts_without
from keras_ebft.networks import adapters
from keras_ebft.networks.families import family_of, num_layers, parts_of
from keras_ebft.networks.routed_network import RoutedNetwork
from keras_ebft.networks.row_network import RowNetwork


def routed_backbone(backbone, rematerialize=False):
    """The whole backbone as a network that ends in final hidden states.

    Args:
        backbone: a supported KerasHub backbone.
        rematerialize: bool, whether decoder layers run again in the backward pass.

    Returns:
        `RoutedNetwork` or `RowNetwork`.
    """
    model, depth = _whole(backbone), num_layers(backbone)
    if family_of(backbone).attention is None:
        return RowNetwork(model, backbone, depth, rematerialize=rematerialize)
    return RoutedNetwork(model, backbone, None, depth, rematerialize=rematerialize)


def _whole(backbone):
    """A model of the backbone that ends where the output head begins."""
    output = family_of(backbone).output(backbone)
    if output is backbone.output:
        return backbone
    return keras.Model(backbone.input, output)


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
    family, depth = family_of(backbone), num_layers(backbone)
    source = backbone if adapted else _copy(backbone, layers[-1], with_head, name)
    outputs = family.tapped_outputs(source, layers, depth)
    model = keras.Model(source.input, outputs, name=name)
    if not adapted:
        model.trainable = False
    if family.attention is None:
        return RowNetwork(model, source, layers[-1], adapted)
    return RoutedNetwork(model, source, layers, depth, adapted)


def copied_variables(copy, original):
    """Pairs of variables of a frozen copy and of what it was copied from.

    Args:
        copy: layer or model; may lack an output projection and upper layers.
        original: the layer or model of the same names.
    """
    if not isinstance(copy, keras.Model):
        return list(zip(copy.variables, original.variables))
    originals = {part.name: part for part in parts_of(original)}
    pairs = []
    for part in parts_of(copy):
        if part.variables:
            pairs.extend(copied_variables(part, originals[part.name]))
    return pairs


def leading(array, shape):
    """The part of an array that belongs to the lower layers a copy has.

    Gemma 3n and Gemma 4 keep what all layers read of a token side by side.

    Args:
        array: array or tensor.
        shape: shape of the copy's variable.
    """
    return array[tuple(slice(size) for size in shape)]


def _copy(backbone, kept, with_head, name):
    config = _trimmed_config(backbone, kept, with_head)
    # Keras finds a PyTorch parameter by its variable's path: without a scope of
    # its own the copy would take the place of the trained weights.
    with keras.name_scope(name), layouts_without(name):
        copy = type(backbone).from_config(config)
    for variable, original in copied_variables(copy, backbone):
        # By way of NumPy: `assign` may share a buffer, which JAX then donates.
        variable.assign(leading(original.numpy(), variable.shape))
    return copy


def _trimmed_config(backbone, kept, with_head):
    """The configuration of a copy with the lower `kept` decoder layers."""
    family = family_of(backbone)
    config = {**backbone.get_config(), family.depth_setting: kept}
    for setting in family.per_layer_settings:
        if isinstance(config.get(setting), (list, tuple)):
            config[setting] = config[setting][:kept]
    if config.get(family.shared_setting):
        own = num_layers(backbone) - config[family.shared_setting]
        config[family.shared_setting] = max(0, kept - own)
    if family.tying_setting is not None:
        # Without logits the copy needs no output projection of its own. (Llama 3's
        # own configuration does not say whether it has one.)
        tied = backbone.token_embedding.tie_weights
        config[family.tying_setting] = tied or not with_head
    return config
