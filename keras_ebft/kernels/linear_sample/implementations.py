"""The implementations of `linear_sample`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.linear_sample"

IMPLEMENTATIONS = (
    Implementation("chunked", f"{_HERE}.chunked:linear_sample_chunked"),
    Implementation("reference", f"{_HERE}.reference:linear_sample_reference"),
)
