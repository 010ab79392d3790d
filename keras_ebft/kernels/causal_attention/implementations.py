"""The implementations of `causal_attention`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.causal_attention"

IMPLEMENTATIONS = (
    Implementation("reference", f"{_HERE}.reference:causal_attention_reference"),
)
