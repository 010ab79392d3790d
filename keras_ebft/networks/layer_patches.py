"""What every decoder layer runs with, whatever its family, as patches."""

import functools

import keras
from keras import ops

from keras_ebft.backend.runtime import after
from keras_ebft.kernels.projection import projection
from keras_ebft.networks.layer_powers import powers_by_numbers
from keras_ebft.networks.patches import Patch


def token_by_token(decoder):
    """Patches with which a decoder layer reads each token as a row of its own.

    - Projections of `[tokens, 1, ...]` run through `kernels.projection`, or else as
      `[1, tokens, ...]`: the gradient of what Keras runs as a batch of one-token
      products would hold one kernel-sized matrix per token on TensorFlow, before
      their sum.
    - Quantized layers read their kernels when inputs are there: those of all layers
      and passes would else lie unpacked in memory before the first of them is used.
    - Attention masks are not made: the caller's attention has its own.
    - Layers forget their `keras.RematScope`; see `without_remat_scope`.
    - Exponents of powers stay numbers; see `powers_by_numbers`.

    Args:
        decoder: decoder layer.

    Returns:
        list of `Patch`.
    """
    patches = [
        *without_remat_scope(decoder),
        *_without_masks(decoder),
        *powers_by_numbers(decoder),
    ]
    for layer in _with_layers_within(decoder):
        if getattr(layer, "quantization_mode", None) is not None:
            call = _after_inputs(layer.quantized_call)
            patches.append(Patch(layer, "quantized_call", call))
        elif count := _contracted_axes(layer):
            call = functools.partial(_projected, layer, count)
            patches.append(Patch(layer, "call", call))
        elif type(layer) is keras.layers.EinsumDense and _passes_tokens(layer):
            patches.append(Patch(layer, "call", _on_one_axis(layer.call)))
    return patches


def without_remat_scope(whole):
    """Patches with which a layer and those in it forget their `keras.RematScope`.

    Whether layers run again in the backward pass is decided here, for whole decoder
    layers; see `rematerialisation`.

    Args:
        whole: layer or model.

    Returns:
        list of `Patch`.
    """
    return [
        Patch(layer, "_remat_mode", None)
        for layer in _with_layers_within(whole)
        if getattr(layer, "_remat_mode", None) is not None
    ]


def _without_masks(decoder):
    return [
        Patch(decoder, name, _no_mask)
        for name in ("_compute_self_attention_mask", "_compute_attention_mask")
        if hasattr(decoder, name)
    ]


def _no_mask(*_, **__):
    return None


def _with_layers_within(layer):
    return layer._flatten_layers()


def _passes_tokens(layer):
    """Whether the first two axes pass through a projection."""
    inputs, rest = layer.equation.split(",")
    kernel, outputs = rest.split("->")
    return inputs[:2] == outputs[:2] and not set(inputs[:2]) & set(kernel)


def _contracted_axes(layer):
    """How many axes a layer's product with its kernel sums over; 0 if it is none.

    Those are the last of the inputs and the first of the kernel, whose others come
    last in the outputs.
    """
    if type(layer) is keras.layers.Dense:
        return 1
    if type(layer) is not keras.layers.EinsumDense:
        return 0
    inputs, rest = layer.equation.split(",")
    kernel, outputs = rest.split("->")
    count = sum(axis in kernel for axis in inputs)
    found = inputs[-count:] == kernel[:count] and count > 0
    return count if found and outputs == inputs[:-count] + kernel[count:] else 0


def _projected(layer, count, inputs, training=None):
    """What a `Dense` or `EinsumDense` returns, by `projection`."""
    outputs = projection(inputs, ops.convert_to_tensor(layer.kernel), count)
    if layer.bias is not None:
        outputs = ops.add(outputs, layer.bias)
    return outputs if layer.activation is None else layer.activation(outputs)


def _on_one_axis(call):
    def call_on_one_axis(inputs, *args, **kwargs):
        outputs = call(ops.swapaxes(inputs, 0, 1), *args, **kwargs)
        return ops.swapaxes(outputs, 0, 1)

    return call_on_one_axis


def _after_inputs(call):
    def call_after_inputs(inputs, *args, **kwargs):
        with after(inputs):
            return call(inputs, *args, **kwargs)

    return call_after_inputs
