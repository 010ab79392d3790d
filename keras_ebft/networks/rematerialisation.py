"""Decoder layers that keep their inputs alone and run again in the backward pass."""

import keras

from keras_ebft.backend.gradients import float_tensors
from keras_ebft.networks import adapters
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


def run_again(function):
    """A function that keeps its arguments alone and runs again in the backward pass.

    Args:
        function: of nested tuples, lists and dicts of tensors and anything else; what
            has a gradient must be an argument. It returns such a structure, too, of
            tensors and `None`. A layer that runs twice must hand on nothing behind
            the back of the backend's rematerialisation.

    Returns:
        A function of the same arguments and results.
    """

    def run(*arguments):
        # Gradients flow to what comes by position.
        given, rebuild = float_tensors(arguments)
        returned = []

        def once(*given):
            outputs = function(*rebuild(*given))
            # Not the tensors themselves, which would stay alive with this function.
            returned[:] = [
                keras.tree.map_structure(lambda leaf: leaf is not None, outputs)
            ]
            # TensorFlow allows nothing but tensors.
            leaves = keras.tree.flatten(outputs)
            return [leaf for leaf in leaves if leaf is not None]

        tensors = iter(keras.remat(once)(*given))
        return keras.tree.map_structure(
            lambda is_tensor: next(tensors) if is_tensor else None, returned[0]
        )

    return run
