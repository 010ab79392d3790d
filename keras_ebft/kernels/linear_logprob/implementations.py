"""The implementations of `linear_logprob`, best first."""

from keras_ebft.backend.device import TRITON_INTERPRETED_ON
from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.linear_logprob"

# On CPU, where they run only if forced, Pallas' interpreter takes their place.
_PALLAS = {
    "backends": ("jax",),
    "forced_platforms": ("cpu",),
    "dtypes": ("float32", "bfloat16"),
    "options": ("soft_cap",),
}

IMPLEMENTATIONS = (
    Implementation(
        "pallas_tpu",
        f"{_HERE}.jax_pallas_tpu:linear_logprob_pallas_tpu",
        platforms=("tpu",),
        unproven=True,
        **_PALLAS,
    ),
    Implementation(
        "pallas_gpu",
        f"{_HERE}.jax_pallas_gpu:linear_logprob_pallas_gpu",
        platforms=("cuda",),
        unproven=True,
        min_capability=(8, 0),
        **_PALLAS,
    ),
    Implementation(
        "triton",
        f"{_HERE}.torch_triton:linear_logprob_triton",
        backends=("torch",),
        platforms=("cuda",),
        unproven=True,
        forced_platforms=TRITON_INTERPRETED_ON,
        min_capability=(8, 0),
        dtypes=("float32", "bfloat16"),
        options=("soft_cap",),
        packages=("triton",),
    ),
    Implementation(
        "in_place",
        f"{_HERE}.torch_in_place:linear_logprob_in_place",
        backends=("torch",),
        platforms=("cpu",),
        dtypes=("float32", "bfloat16"),
    ),
    Implementation("chunked", f"{_HERE}.chunked:linear_logprob_chunked"),
    Implementation("reference", f"{_HERE}.reference:linear_logprob_reference"),
)
