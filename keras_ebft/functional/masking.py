"""Sums and means of what counts."""

from keras import ops

from keras_ebft.typing import Tensor


def only_where(mask: Tensor, values: Tensor) -> Tensor:
    """Values where a mask is above 0, and 0 elsewhere.

    Neither the result nor its gradient depends on what is replaced: to be called
    before anything whose derivative may be infinite.

    Args:
        mask: float tensor that broadcasts to `values`.
        values: float tensor, or one that broadcasts to `mask`.

    Returns:
        tensor of the dtype of `values`.
    """
    values = ops.convert_to_tensor(values)
    counts = ops.convert_to_tensor(mask) > 0
    return ops.where(counts, values, ops.zeros_like(values))


def masked_mean(
    values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None
) -> Tensor:
    """Mean of `values` where `mask` is 1; 0 where nothing is counted.

    Masked values are replaced before the sum, so that a NaN or infinity under
    the mask reaches neither the result nor its gradient.

    Args:
        values: float tensor.
        mask: float tensor of 0 and 1 that broadcasts to `values`.
        axis: int, tuple of ints or `None` for all axes.

    Returns:
        float32 tensor without `axis`.
    """
    values = ops.convert_to_tensor(values)
    mask = ops.broadcast_to(ops.convert_to_tensor(mask), values.shape)
    kept = only_where(mask, values)
    count = ops.sum(mask, axis=axis)
    return ops.sum(kept, axis=axis) / ops.maximum(count, 1.0)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of `weights * values`; what has no weight is not even looked at.

    Args:
        values: float32 tensor; may be infinite or NaN where the weight is 0.
        weights: float32 tensor of the same shape.

    Returns:
        float32 scalar.
    """
    return ops.sum(weights * only_where(weights, values))
