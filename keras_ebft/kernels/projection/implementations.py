"""The implementations of `projection`, best first."""

from keras_ebft.kernels.dispatch import Implementation

_HERE = "keras_ebft.kernels.projection"

IMPLEMENTATIONS = (
    Implementation(
        "onednn",
        f"{_HERE}.torch_onednn:projection_onednn",
        backends=("torch",),
        platforms=("cpu",),
        makers=("AuthenticAMD",),
        dtypes=("float32",),
    ),
    Implementation("matrices", f"{_HERE}.matrices:projection_matrices"),
    Implementation("reference", f"{_HERE}.reference:projection_reference"),
)
