"""The implementations of `strided_attention`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.strided_attention"

IMPLEMENTATIONS = (
    Implementation("blockwise", f"{_HERE}.blockwise:strided_attention_blockwise"),
    Implementation("reference", f"{_HERE}.reference:strided_attention_reference"),
)
