"""The product of tokens and a layer's kernel."""

from keras_ebft.backend.runtime import backend_name
from keras_ebft.kernels import dispatch
from keras_ebft.kernels.projection.implementations import IMPLEMENTATIONS
from keras_ebft.kernels.projection.reference import projection_reference
from keras_ebft.typing import Tensor

dispatch.register("projection", IMPLEMENTATIONS)


def projects_matrices() -> bool:
    """Whether there is anything but the plain product on the running backend."""
    return any(
        backend_name() in implementation.backends
        for implementation in IMPLEMENTATIONS[:-1]
    )


def projection(inputs: Tensor, kernel: Tensor) -> Tensor:
    """Each row of inputs times a kernel.

    Args:
        inputs: float tensor `[R, C]`.
        kernel: float tensor `[C, N]`.

    Returns:
        float tensor `[R, N]`, `sum_c inputs[r, c] kernel[c, n]`.
    """
    return dispatch.choose("projection", (inputs, kernel))(inputs, kernel)


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """A product within another path: `projection`, where a backend has a choice."""
    run = projection if projects_matrices() else projection_reference
    return run(rows, matrix)
