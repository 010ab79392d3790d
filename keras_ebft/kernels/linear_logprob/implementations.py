"""The implementations of `linear_logprob`, best first."""

from keras_ebft.kernels.device import TRITON_INTERPRETED_ON
from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.linear_logprob"

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        f"{_HERE}.torch_triton:linear_logprob_triton",
        backends=("torch",),
        platforms=("cuda",),
        forced_platforms=TRITON_INTERPRETED_ON,
        min_capability=(8, 0),
        dtypes=("float32", "bfloat16"),
        options=("soft_cap",),
        packages=("triton",),
    ),
    Implementation("chunked", f"{_HERE}.chunked:linear_logprob_chunked"),
    Implementation("reference", f"{_HERE}.reference:linear_logprob_reference"),
)
