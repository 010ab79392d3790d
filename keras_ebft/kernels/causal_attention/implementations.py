"""The implementations of `causal_attention`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.causal_attention"

IMPLEMENTATIONS = (
    Implementation(
        "fused",
        f"{_HERE}.torch_fused:causal_attention_fused",
        backends=("torch",),
        dtypes=("float32", "bfloat16", "float16"),
        options=(),
    ),
    Implementation(
        "cudnn",
        f"{_HERE}.jax_cudnn:causal_attention_cudnn",
        backends=("jax",),
        platforms=("cuda",),
        forced_platforms=("cpu",),
        unproven=True,
        min_capability=(8, 0),
        dtypes=("bfloat16", "float16"),
        head_sizes=range(8, 129, 8),
        options=("sliding_window",),
    ),
    Implementation("blockwise", f"{_HERE}.blockwise:causal_attention_blockwise"),
    Implementation("reference", f"{_HERE}.reference:causal_attention_reference"),
)
