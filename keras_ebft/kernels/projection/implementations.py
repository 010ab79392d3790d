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
    # Of kernels in parts, reshaped ones would be sent from device to device.
    Implementation("matrices", f"{_HERE}.matrices:projection_matrices", options=()),
    Implementation("reference", f"{_HERE}.reference:projection_reference"),
)
