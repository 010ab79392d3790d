"""The implementations of `feature_reward`, best first."""

from keras_ebft.kernels.device import TRITON_INTERPRETED_ON
from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.feature_reward"

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        f"{_HERE}.torch_triton:feature_reward_triton",
        backends=("torch",),
        platforms=("cuda",),
        only_forced=True,
        forced_platforms=TRITON_INTERPRETED_ON,
        min_capability=(8, 0),
        dtypes=("float32", "bfloat16"),
        # At most 16 samples.
        options=(),
        packages=("triton",),
    ),
    Implementation("reference", f"{_HERE}.reference:feature_reward_reference"),
)
