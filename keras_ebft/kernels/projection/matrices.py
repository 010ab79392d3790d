"""`projection` as a product of two matrices, whatever the shapes.

Tokens come as `[tokens, 1, ...]`. Of products of such shapes XLA makes the gradient by
a kernel slowly: it copies a transposed side, computing it again element by element.
"""

import math

from keras import ops


def projection_matrices(inputs, kernel, axes=1):
    """See `keras_ebft.kernels.projection`."""
    if len(inputs.shape) == len(kernel.shape) == 2:
        return ops.matmul(inputs, kernel)
    lead, new = inputs.shape[: len(inputs.shape) - axes], kernel.shape[axes:]
    width = math.prod(kernel.shape[:axes])
    rows, matrix = ops.reshape(inputs, (-1, width)), ops.reshape(kernel, (width, -1))
    return ops.reshape(ops.matmul(rows, matrix), (*lead, *new))
