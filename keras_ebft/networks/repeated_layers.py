"""Decoder layers that are alike, as one layer in a loop over the weights of each.

A compiled loop is one program of the layer, where layers written one after another
are as many programs.
"""

import keras
from keras import ops

from keras_ebft.backend.loops import compiles_every_step, loop
from keras_ebft.networks.patches import Patch, patched
from keras_ebft.networks.rematerialisation import run_again

# A step in loops takes some more time and memory, and the first call the less the
# deeper the network is: with 8 layers it was not worth it (docs/benchmarks.md).
FEWEST_LAYERS = 12
# Layers between two taps are a loop of their own, which has to be worth its start.
FEWEST_IN_A_LOOP = 4


def worth_looping(family, decoders, given, depth):
    """Whether decoder layers run as one in a loop.

    Args:
        family: `Family`.
        decoders: list of decoder layers that follow one another.
        given: list with what each is given besides its input.
        depth: int, layers of the whole network.
    """
    return (
        compiles_every_step()
        and family.repeated
        and depth >= FEWEST_LAYERS
        and len(decoders) >= FEWEST_IN_A_LOOP
        and all(own is given[0] for own in given)
        and all(_shapes(own) == _shapes(decoders[0]) for own in decoders)
    )


def _shapes(decoder):
    return [(tuple(v.shape), v.dtype) for v in decoder.variables]


def run_repeated(layer, decoders, x, given, caches, again):
    """Runs like layers as the first of them, with the weights of each.

    Args:
        layer: function `(x, given, cache) -> (x, cache)` that runs the first.
        decoders: list of decoder layers.
        x: tensor that runs from layer to layer.
        given: what every layer is given.
        caches: list with one structure of tensors, or `None`, per layer.
        again: bool, whether a layer runs again in the backward pass.

    Returns:
        `(x, caches)`, as if they had run one after another.
    """
    variables = decoders[0].variables

    def step(x, weights_and_cache):
        weights, cache = weights_and_cache
        mapping = list(zip(variables, weights))
        with keras.StatelessScope(state_mapping=mapping, initialize_variables=False):
            return layer(x, given, cache)

    step = run_again(step) if again else step
    weights = [weights_of(decoder) for decoder in decoders]
    return loop(step, x, list(zip(weights, caches)))


def weights_of(decoder):
    """Every variable of a layer as a tensor, in the order of `decoder.variables`."""
    # As they are stored: the layer casts its own.
    as_stored = [Patch(v, "_autocast", False) for v in decoder.variables]
    with patched(as_stored):
        return [ops.convert_to_tensor(variable) for variable in decoder.variables]
