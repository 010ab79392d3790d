"""Which quantized models can be trained rightly, by adapters on a frozen base."""

import keras

from keras_ebft.backend.runtime import multiplies_mixed_dtypes
from keras_ebft.networks import adapters


def check_quantization(backbone):
    """Checks that a quantized backbone can be trained rightly.

    Raises:
        ValueError: if quantized layers have no adapters to train, the gradient
            through quantized embeddings would be wrong, the mode is float8, or
            Keras cannot run the dtype policy on this backend.
    """
    quantized = {
        layer.path: layer
        for layer in adapters.layers_of(backbone)
        if getattr(layer, "quantization_mode", None) is not None
    }
    if not quantized:
        return
    name = type(backbone).__name__
    modes = sorted({layer.quantization_mode for layer in quantized.values()})
    if not set(modes) <= {"int8", "int4"}:
        raise ValueError(
            f"Expected quantization to int8 or int4. Received: a {name} quantized "
            f"to {', '.join(modes)}, on which Keras trains no adapters. Use "
            'causal_lm.quantize("int8", filters=...) on the unquantized model.'
        )
    embeddings = [
        path for path, la in quantized.items() if isinstance(la, keras.layers.Embedding)
    ]
    if embeddings:
        raise ValueError(
            "Expected embeddings that are not quantized: the gradient that Keras "
            "computes through them as output head is wrong. Received: a "
            f"{name} with quantized {embeddings[0]}. Quantize dense layers "
            f'only: causal_lm.quantize("{modes[0]}", filters=is_dense), with '
            "is_dense(layer) = isinstance(layer, (keras.layers.Dense, "
            "keras.layers.EinsumDense))."
        )
    if not adapters.adapted_layers(backbone):
        raise ValueError(
            "Expected adapters on a quantized model, whose own kernels cannot be "
            f"trained. Received: a {name} quantized to {modes[0]} without any. Call "
            "causal_lm.backbone.enable_lora(rank) first."
        )
    policy = dtype_policy_name(backbone)
    if policy in ("bfloat16", "float16") and not multiplies_mixed_dtypes():
        # Keras keeps adapters in float32.
        raise ValueError(
            "Expected a mixed policy, or float32, for adapters on a quantized model "
            f"on PyTorch, where Keras cannot run them otherwise. Received: a {name} "
            f"quantized to {modes[0]} with dtype={policy!r}. Load the model with "
            f"dtype='mixed_{policy}' or dtype='float32'."
        )


def dtype_policy_name(backbone):
    """Name of the Keras dtype policy that a backbone computes under."""
    compute, variable = backbone.compute_dtype, backbone.variable_dtype
    return compute if compute == variable else f"mixed_{compute}"
