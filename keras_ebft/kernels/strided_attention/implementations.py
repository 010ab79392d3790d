"""The implementations of `strided_attention`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.strided_attention"

IMPLEMENTATIONS = (
    Implementation("tiled", f"{_HERE}.tiled:strided_attention_tiled"),
    Implementation("reference", f"{_HERE}.reference:strided_attention_reference"),
)
