"""Attributes lent to layers for a while."""

import contextlib

import keras
from keras import ops

from keras_ebft.backend.runtime import after


@contextlib.contextmanager
def lent(owner, name, value):
    """Gives an instance an attribute in place of its own or its class's.

    Args:
        owner: layer.
        name: str.
        value: a method or setting, not a layer or variable.
    """
    # Past the trackers of Keras and PyTorch, which it is none of the business of.
    missing = object()
    own = vars(owner).get(name, missing)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if own is missing:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, own)


@contextlib.contextmanager
def tokens_on_one_axis(decoders):
    """Context in which projections of `[tokens, 1, ...]` run as `[1, tokens, ...]`.

    The gradient of a projection that Keras runs as a batch of one-token products
    would hold one kernel-sized matrix per token on TensorFlow, before their sum.

    Args:
        decoders: list of decoder layers, which see each token as a row of its own.
    """
    with contextlib.ExitStack() as stack:
        for decoder in decoders:
            for layer in decoder._flatten_layers():
                if type(layer) is keras.layers.EinsumDense and _projects_tokens(layer):
                    stack.enter_context(lent(layer, "call", _on_one_axis(layer.call)))
        yield


@contextlib.contextmanager
def kernels_unpacked_late(decoders):
    """Context in which quantized layers read their kernels when inputs are there.

    The kernels of all layers and passes would else lie unpacked in memory before
    the first of them is used.

    Args:
        decoders: list of decoder layers.
    """
    with contextlib.ExitStack() as stack:
        for decoder in decoders:
            for layer in decoder._flatten_layers():
                if getattr(layer, "quantization_mode", None) is not None:
                    late = _after_inputs(layer.quantized_call)
                    stack.enter_context(lent(layer, "quantized_call", late))
        yield


def _after_inputs(call):
    def call_after_inputs(inputs, *args, **kwargs):
        with after(inputs):
            return call(inputs, *args, **kwargs)

    return call_after_inputs


def _projects_tokens(layer):
    """Whether the first two axes pass through, and the layer is not quantized."""
    inputs, rest = layer.equation.split(",")
    kernel, outputs = rest.split("->")
    passed = inputs[:2] == outputs[:2] and not set(inputs[:2]) & set(kernel)
    return passed and layer.quantization_mode is None


def _on_one_axis(call):
    def call_on_one_axis(inputs, *args, **kwargs):
        outputs = call(ops.swapaxes(inputs, 0, 1), *args, **kwargs)
        return ops.swapaxes(outputs, 0, 1)

    return call_on_one_axis
