"""The implementations of `strided_attention`, best first."""

from keras_ebft.backend.device import TRITON_INTERPRETED_ON
from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.strided_attention"

# On CPU, where they run only if forced, Pallas' interpreter takes their place.
_PALLAS = {
    "backends": ("jax",),
    "forced_platforms": ("cpu",),
    "dtypes": ("float32", "bfloat16"),
    "options": (
        "tensor_anchors",
        "tensor_offset",
        "starts",
        "sliding_window",
        "soft_cap",
    ),
}

IMPLEMENTATIONS = (
    Implementation(
        "pallas_tpu",
        f"{_HERE}.jax_pallas_tpu:strided_attention_pallas_tpu",
        platforms=("tpu",),
        unproven=True,
        head_sizes=range(8, 257, 8),
        **_PALLAS,
    ),
    Implementation(
        "pallas_gpu",
        f"{_HERE}.jax_pallas_gpu:strided_attention_pallas_gpu",
        platforms=("cuda",),
        unproven=True,
        min_capability=(8, 0),
        head_sizes=range(1, 257),
        **_PALLAS,
    ),
    Implementation(
        "triton",
        f"{_HERE}.torch_triton:strided_attention_triton",
        backends=("torch",),
        platforms=("cuda",),
        unproven=True,
        forced_platforms=TRITON_INTERPRETED_ON,
        min_capability=(8, 0),
        dtypes=("float32", "bfloat16"),
        head_sizes=range(1, 257),
        options=("tensor_anchors", "starts", "sliding_window", "soft_cap"),
        packages=("triton",),
    ),
    Implementation(
        "fused",
        f"{_HERE}.torch_fused:strided_attention_fused",
        backends=("torch",),
        platforms=("cpu",),
        dtypes=("float32", "bfloat16"),
        options=("tensor_anchors", "tensor_offset", "starts", "sliding_window"),
    ),
    Implementation("blockwise", f"{_HERE}.blockwise:strided_attention_blockwise"),
    Implementation("reference", f"{_HERE}.reference:strided_attention_reference"),
)
