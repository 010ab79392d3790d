"""What is known to be good about a rollout beside its truth, in NumPy."""

import numpy as np

QUALITIES = ("share", "prefix", "last")


def compare_with_truth(token_ids, true_ids, counted):
    """How much of the truth rollouts hold.

    Args:
        token_ids: int array `[B, n, K, G]`, rollouts; where a rollout has ended, no
            token of the vocabulary (-1).
        true_ids: int array `[B, K, G]`.
        counted: bool array `[B, K, G]`, true tokens that count.

    Returns:
        dict of float64 `[B, n, K]`: `share`, of the true tokens, how many stand in
        their places; `prefix`, how many do before the first that does not; `last`,
        whether the last one does.
    """
    counted = np.broadcast_to(counted[:, None], token_ids.shape)
    right = (token_ids == true_ids[:, None]) & counted
    number = counted.sum(axis=-1)
    unbroken = np.cumprod(right | ~counted, axis=-1).astype(bool)
    steps = np.arange(token_ids.shape[-1])
    last = np.max(np.where(counted, steps, 0), axis=-1)
    at_last = np.take_along_axis(right, last[..., None], axis=-1)[..., 0]
    return {
        "share": right.sum(axis=-1) / np.maximum(number, 1),
        "prefix": (right & unbroken).sum(axis=-1).astype("float64"),
        "last": at_last.astype("float64"),
    }
