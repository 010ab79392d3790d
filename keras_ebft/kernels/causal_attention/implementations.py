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
    Implementation("blockwise", f"{_HERE}.blockwise:causal_attention_blockwise"),
    Implementation("reference", f"{_HERE}.reference:causal_attention_reference"),
)
