"""The definition of `projection`."""

from keras import ops


def projection_reference(inputs, kernel):
    """See `keras_ebft.kernels.projection`."""
    return ops.matmul(inputs, kernel)
