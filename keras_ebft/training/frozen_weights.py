"""Which weights are frozen: Keras' configurations of layers do not say."""

import keras

from keras_ebft.networks import adapters


def frozen_weights(causal_lm: keras.Model) -> list[int]:
    """Which of the weights that could be trained are not, by number.

    With adapters those are the adapters' own.

    Args:
        causal_lm: KerasHub `CausalLM`.

    Returns:
        list of indices of `causal_lm.variables`.
    """
    adapted = bool(adapters.adapted_layers(causal_lm.backbone))
    return [
        index
        for index, variable in enumerate(causal_lm.variables)
        if not variable.trainable
        and keras.backend.is_float_dtype(variable.dtype)
        and (not adapted or "lora" in variable.name)
    ]


def freeze_weights(causal_lm: keras.Model, frozen: list[int]) -> None:
    """Freezes what `frozen_weights` said of a model like this one."""
    for index in frozen:
        causal_lm.variables[index].trainable = False
