"""The definition of `projection`."""

from keras import ops


def projection_reference(inputs, kernel, axes=1):
    """See `keras_ebft.kernels.projection`."""
    return ops.tensordot(inputs, kernel, axes=axes)
