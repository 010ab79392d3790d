"""`projection` by oneDNN, which PyTorch brings along, in place of MKL.

PyTorch's own products of float32 matrices run in MKL, which on AMD's processors takes
more than twice as long as oneDNN for the same sums (docs/kernels.md). The operation
called here is the one that PyTorch itself puts into what it compiles.
"""

import math

import torch

# Numbers multiplied in a product; a smaller one does not make up for the call.
FEWEST_PRODUCTS = 2**21


def projection_onednn(inputs, kernel, axes=1):
    """See `keras_ebft.kernels.projection`."""
    lead = inputs.shape[: inputs.dim() - axes]
    width = math.prod(kernel.shape[:axes])
    run = _Projection.apply if torch.is_grad_enabled() else _product
    outputs = run(inputs.reshape(-1, width), kernel.reshape(width, -1))
    return outputs.reshape(*lead, *kernel.shape[axes:])


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, kernel):
        ctx.save_for_backward(inputs, kernel)
        return _product(inputs, kernel)

    @staticmethod
    def backward(ctx, upstream):
        inputs, kernel = ctx.saved_tensors
        by_inputs, by_kernel = ctx.needs_input_grad
        return (
            _product(upstream, kernel.t()) if by_inputs else None,
            _product(inputs.t(), upstream) if by_kernel else None,
        )


def _product(rows, matrix):
    if rows.shape[0] * matrix.numel() < FEWEST_PRODUCTS:
        return rows @ matrix
    # oneDNN reads rows one after another: of two sides to copy, the smaller one is.
    if rows.t().is_contiguous() and matrix.numel() < rows.numel():
        return _multiply(matrix.t(), rows.t()).t()
    return _multiply(rows, matrix)


def _multiply(rows, matrix):
    # Of memory with gaps oneDNN makes sums one by one, a thousand times slower.
    if not (matrix.is_contiguous() or matrix.t().is_contiguous()):
        matrix = matrix.contiguous()
    linear = _linear()
    return linear(rows.contiguous(), matrix.t(), None, "none", [], "")


def _linear():
    return torch.ops.mkldnn._linear_pointwise
