"""The random numbers of a step.

All are drawn before anything is sampled, because a generator cannot be advanced
inside a compiled loop.
"""

from typing import Any

import keras

from keras_ebft.backend.replicas import own_rows, rows_together
from keras_ebft.layout.documents import Documents
from keras_ebft.typing import Seed, Tensor


def draw_numbers(
    sampler: Any, documents: Documents, seed: Seed
) -> tuple[Tensor, Tensor | None]:
    """What decides rollouts, and random anchors.

    Replicas draw the numbers of the whole batch and take those of their own rows, so
    that no two draw the same, and all together what one would draw.

    Args:
        sampler: `BlockSampler`.
        documents: `Documents`.
        seed: int or `keras.random.SeedGenerator`.

    Returns:
        `(uniform, anchor_uniform)`, float32 in [0, 1): `[B, n, K, G]`, and `[B, T]`
        or `None` where anchors are not random.
    """
    batch, length = documents.token_ids.shape
    together = rows_together(batch)
    shape = (
        together,
        sampler.num_samples,
        sampler.num_blocks(documents),
        sampler.rollout_length,
    )
    uniform = keras.random.uniform(shape, dtype="float32", seed=seed)
    uniform = own_rows(uniform, batch)
    if not sampler.draws_anchors or documents.anchors is not None:
        return uniform, None
    if isinstance(seed, int):
        # An int would draw the same numbers again.
        seed = seed + 1
    places = keras.random.uniform((together, length), dtype="float32", seed=seed)
    return uniform, own_rows(places, batch)
