"""What evaluation accepts as a model."""

import keras_hub

from keras_ebft.model import EBFTModel


def causal_lm_of(
    model: EBFTModel | keras_hub.models.CausalLM,
) -> keras_hub.models.CausalLM:
    """The language model of an `EBFTModel`, or a `CausalLM` itself.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(model, EBFTModel):
        return model.causal_lm
    if isinstance(model, keras_hub.models.CausalLM):
        return model
    raise TypeError(
        "Expected an EBFTModel or a keras_hub CausalLM. Received: "
        f"{model!r} (of type {type(model).__name__})."
    )
