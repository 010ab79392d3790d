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
    stops = _stops(token_ids, stop_token_ids)
    return ops.cumsum(stops, axis=-1) - stops == 0


def ended(token_ids: Tensor, stop_token_ids: tuple[int, ...]) -> Tensor | None:
    """Which rollouts hold a stop token.

    Args:
        token_ids: int32 tensor `[..., G]`.
        stop_token_ids: tuple of ints.

    Returns:
        bool tensor `[...]`, or `None` where there are no stop tokens.
    """
    if not stop_token_ids:
        return None
    return ops.any(_stops(token_ids, stop_token_ids) > 0, axis=-1)


def _stops(token_ids: Tensor, stop_token_ids: tuple[int, ...]) -> Tensor:
    return sum(ops.cast(token_ids == stop, "int32") for stop in stop_token_ids)
