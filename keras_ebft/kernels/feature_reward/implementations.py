"""The implementations of `feature_reward`, best first."""

from keras_ebft.backend.device import TRITON_INTERPRETED_ON
from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.feature_reward"

# On CPU, where they run only if forced, Pallas' interpreter takes their place.
_PALLAS = {
    "backends": ("jax",),
    "forced_platforms": ("cpu",),
    "dtypes": ("float32", "bfloat16"),
    # At most 16 samples.
    "options": (),
    "unproven": True,
}

IMPLEMENTATIONS = (
    Implementation(
        "pallas_tpu",
        f"{_HERE}.jax_pallas_tpu:feature_reward_pallas_tpu",
        platforms=("tpu",),
        **_PALLAS,
    ),
    Implementation(
        "pallas_gpu",
        f"{_HERE}.jax_pallas_gpu:feature_reward_pallas_gpu",
        platforms=("cuda",),
        min_capability=(8, 0),
        **_PALLAS,
    ),
    Implementation(
        "triton",
        f"{_HERE}.torch_triton:feature_reward_triton",
        backends=("torch",),
        platforms=("cuda",),
        unproven=True,
        forced_platforms=TRITON_INTERPRETED_ON,
        min_capability=(8, 0),
        dtypes=("float32", "bfloat16"),
        # At most 16 samples.
        options=(),
        packages=("triton",),
    ),
    Implementation("reference", f"{_HERE}.reference:feature_reward_reference"),
)
