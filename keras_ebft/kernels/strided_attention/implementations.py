"""The implementations of `strided_attention`, best first."""

from keras_ebft.kernels.device import TRITON_INTERPRETED_ON
from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.strided_attention"

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        f"{_HERE}.torch_triton:strided_attention_triton",
        backends=("torch",),
        platforms=("cuda",),
        forced_platforms=TRITON_INTERPRETED_ON,
        min_capability=(8, 0),
        dtypes=("float32", "bfloat16"),
        head_sizes=range(1, 257),
        options=("tensor_anchors", "starts", "sliding_window", "soft_cap"),
        packages=("triton",),
    ),
    Implementation("blockwise", f"{_HERE}.blockwise:strided_attention_blockwise"),
    Implementation("reference", f"{_HERE}.reference:strided_attention_reference"),
)
