"""The implementations of `linear_logprob`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.linear_logprob"

IMPLEMENTATIONS = (
    Implementation("chunked", f"{_HERE}.chunked:linear_logprob_chunked"),
    Implementation("reference", f"{_HERE}.reference:linear_logprob_reference"),
)
