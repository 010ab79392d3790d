"""The product of tokens and a layer's kernel."""

from keras_ebft.kernels import dispatch
from keras_ebft.kernels.projection.implementations import IMPLEMENTATIONS
from keras_ebft.typing import Tensor

dispatch.register("projection", IMPLEMENTATIONS)


def projection(inputs: Tensor, kernel: Tensor, axes: int = 1) -> Tensor:
    """The sum of inputs times a kernel over axes that they share.

    Args:
        inputs: float tensor `[..., *C]`, such as hidden states.
        kernel: float tensor `[*C, *N]`.
        axes: int, number of axes C, which are summed over.

    Returns:
        float tensor `[..., *N]`, `sum_c inputs[..., c] kernel[c, n]`.
    """
    run = dispatch.choose("projection", (inputs, kernel), settings={"axes": axes})
    return run(inputs, kernel, axes)
