"""Per-token features of a block pooled into what is matched."""

from keras import ops

from keras_ebft.typing import Tensor

POOLINGS = ("last_token", "mean", "concat", "token")
NORM_EPSILON = 1e-12


def pool(tokens: Tensor, counted: Tensor, exists: Tensor, pooling: str) -> Tensor:
    """Pools over the tokens of each block.

    - `"last_token"`: the last token that counts.
    - `"mean"`: sum of the tokens that count over the number of tokens there are:
      as in the authors' code, tokens outside the answer count as zero vectors.
    - `"concat"`: all tokens, zero where they do not count.
    - `"token"`: every token by itself, zero where it does not count.

    Args:
        tokens: float32 tensor `[..., G, F, D]`.
        counted: bool tensor `[..., G]`.
        exists: bool tensor `[..., G]`.
        pooling: one of the above.

    Returns:
        float32 tensor `[..., F, D]`, `[..., F, G * D]` with `"concat"` or
        `[..., G, F, D]` with `"token"`; 0 where no token counts.
    """
    if pooling == "last_token":
        return _last(tokens, counted)
    tokens = ops.where(counted[..., None, None], tokens, ops.zeros_like(tokens))
    if pooling == "token":
        return tokens
    if pooling == "mean":
        total = ops.sum(ops.cast(exists, "float32"), axis=-1)[..., None, None]
        return ops.sum(tokens, axis=-3) / ops.maximum(total, 1.0)
    *lead, steps, features, width = tokens.shape
    tokens = ops.swapaxes(tokens, -3, -2)
    return ops.reshape(tokens, (*lead, features, steps * width))


def unit_length(features: Tensor) -> Tensor:
    """Features of windows, each window's scaled together to length 1.

    Args:
        features: float tensor `[..., F, D]`.

    Returns:
        float32 tensor of that shape; 0 where all of a window's features are 0.
    """
    features = ops.cast(features, "float32")
    square = ops.sum(ops.square(features), axis=(-2, -1), keepdims=True)
    # Before the root, whose derivative at 0 is infinite.
    return features / ops.sqrt(ops.maximum(square, NORM_EPSILON**2))


def _last(tokens: Tensor, counted: Tensor) -> Tensor:
    step = ops.arange(1, counted.shape[-1] + 1, dtype="int32")
    last = ops.max(ops.where(counted, step, 0), axis=-1)
    # One token of each block is kept, all others become zero.
    is_last = ops.logical_and(step == last[..., None], counted)
    kept = ops.where(is_last[..., None, None], tokens, ops.zeros_like(tokens))
    return ops.sum(kept, axis=-3)
