"""Where rollouts end."""

from keras import ops

from keras_ebft.typing import Tensor


def before_stop(token_ids: Tensor, stop_token_ids: tuple[int, ...]) -> Tensor:
    """Which generated tokens count, up to and with the first stop token.

    Args:
        token_ids: int32 tensor `[..., G]`.
        stop_token_ids: tuple of ints.

    Returns:
        bool tensor `[..., G]`.
    """
    if not stop_token_ids:
        return ops.ones(token_ids.shape, dtype="bool")
    stops = sum(ops.cast(token_ids == stop, "int32") for stop in stop_token_ids)
    return ops.cumsum(stops, axis=-1) - stops == 0
