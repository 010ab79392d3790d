"""Decoder layers that keep their inputs alone and run again in the backward pass.

Attention of a routed network hands keys and values from pass to pass. A layer that
runs twice must not do so behind the back of the backend's rematerialisation, so
they enter and leave the layer as its own inputs and outputs.
"""

import contextlib

import keras

from keras_ebft.backend.gradients import float_tensors
from keras_ebft.networks import adapters
from keras_ebft.networks.lending import lent
from keras_ebft.validation import check_bool


def remat_mode(backbone):
    """How `keras.RematScope` was set where a backbone was built.

    Returns:
        str, or `None` for one built outside any scope.

    Raises:
        ValueError: for parts of layers, which this library cannot run again alone.
    """
    modes = {
        layer._remat_mode.mode
        for layer in adapters.layers_of(backbone)
        if getattr(layer, "_remat_mode", None) is not None
    } - {None}
    others = sorted(modes - {"full"})
    if others:
        raise ValueError(
            "Expected a backbone built outside keras.RematScope or within "
            'keras.RematScope(mode="full"), because decoder layers run again as a '
            f"whole. Received: a {type(backbone).__name__} built with "
            f"mode={others[0]!r}. Build it outside the scope and pass "
            "rematerialize=True to EBFTModel."
        )
    return "full" if modes else None


def resolve_rematerialize(rematerialize, backbone):
    """Whether decoder layers run again: as asked, or as the backbone was built.

    Args:
        rematerialize: bool or `None`.
        backbone: KerasHub backbone.

    Raises:
        TypeError: for anything else.
    """
    if rematerialize is None:
        return remat_mode(backbone) is not None
    return check_bool("rematerialize", rematerialize)


@contextlib.contextmanager
def without_remat_scope(whole):
    """Context in which a layer and those in it forget their `keras.RematScope`."""
    with contextlib.ExitStack() as stack:
        for layer in [whole, *adapters.layers_of(whole)]:
            if getattr(layer, "_remat_mode", None) is not None:
                stack.enter_context(lent(layer, "_remat_mode", None))
        yield


@contextlib.contextmanager
def rematerialised(layers, caches, updated, scope):
    """Context in which decoder layers run again in the backward pass.

    Args:
        layers: list of decoder layers, in the order they are called.
        caches: list with what each layer's attention is given.
        updated: list, gets what each layer's attention returned.
        scope: function `(layer, cache, updated)` that returns the context to run
            one layer in; open both times the layer runs.
    """
    with contextlib.ExitStack() as stack:
        for layer, cache in zip(layers, caches):
            call = _twice(layer, layer.call, cache, updated, scope)
            stack.enter_context(lent(layer, "call", call))
        yield


def _twice(layer, call, cache, updated, scope):
    def run(*args, **kwargs):
        # Gradients flow to what comes by position.
        given, rebuild = float_tensors((args, kwargs, cache))
        returned = []

        def once(*given):
            args, kwargs, cache = rebuild(*given)
            found = []
            # The whole layer, not `call` alone: it sets the precision of its weights.
            with contextlib.ExitStack() as stack:
                stack.enter_context(scope(layer, cache, found))
                stack.enter_context(without_remat_scope(layer))
                stack.enter_context(lent(layer, "call", call))
                outputs = layer(*args, **kwargs)
            everything = (outputs, found)
            # Not the tensors themselves, which would stay alive with this function.
            returned[:] = [
                keras.tree.map_structure(lambda leaf: leaf is not None, everything)
            ]
            # TensorFlow allows nothing but tensors.
            leaves = keras.tree.flatten(everything)
            return [leaf for leaf in leaves if leaf is not None]

        tensors = iter(keras.remat(once)(*given))
        outputs, found = keras.tree.map_structure(
            lambda is_tensor: next(tensors) if is_tensor else None, returned[0]
        )
        updated.extend(found)
        return outputs

    return run
