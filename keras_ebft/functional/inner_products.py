"""Inner products of rollout features and the true feature, and their whitening.

The feature width D appears here once, in three matrix products; whitening,
rewards and losses afterwards work on n x n matrices per block.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice

WHITENINGS = ("rollout", "feature", None)

# Eigenvalues of a Gram matrix below this share of the largest count as zero.
# float32 Gram matrices carry rounding errors of about 1e-7 of the largest, so
# a smaller cut-off would invert noise.
EIGENVALUE_CUTOFF = 1e-6


class InnerProducts(NamedTuple):
    """Inner products of rollouts `x_j` and their targets `t_j`, float32.

    Attributes:
        gram: `[..., n, n]`, `x_i . x_j`.
        cross: `[..., n, n]`, `x_i . t_j`.
        target_gram: `[..., n, n]`, `t_i . t_j`.

    Before whitening all targets of a block are the same vector `phi_*`;
    `"rollout"` whitening scales it differently for each rollout.
    """

    gram: Any
    cross: Any
    target_gram: Any


def feature_inner_products(generated: Tensor, target: Tensor) -> InnerProducts:
    """Inner products of every block, one set per feature.

    Args:
        generated: float tensor `[B, n, K, F, D]`.
        target: float tensor `[B, K, F, D]`.

    Returns:
        `InnerProducts` of shape `[B, K, F, n, n]`.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    generated = ops.cast(generated, "float32")
    target = ops.cast(target, "float32")
    check_feature_shapes(tuple(generated.shape), tuple(target.shape))
    samples = generated.shape[1]
    rows = ops.transpose(generated, (0, 2, 3, 1, 4))
    gram = ops.matmul(rows, ops.swapaxes(rows, -1, -2))
    cross = ops.matmul(rows, target[..., None])
    target_gram = ops.sum(ops.square(target), axis=-1)[..., None, None]
    return InnerProducts(
        gram,
        ops.repeat(cross, samples, axis=-1),
        ops.broadcast_to(target_gram, gram.shape),
    )


def whiten(products: InnerProducts, whitening: str | None) -> InnerProducts:
    """Whitens each block and feature, then sums over features.

    With `M = X X^T`, `g = X phi_*`, `q = |phi_*|^2`:

    - `"rollout"`: `W = (M^+)^{1/2}` acts on the rollouts as `W X` and on the
      target, repeated n times, as `W 1 phi_*^T`. So with `r = W 1` the inner
      products are `W M W = P`, `(W g) r^T` and `q r r^T`, where P projects on
      the range of M. (P itself carries less rounding than `W M W`.)
    - `"feature"`: `Sigma = X^T X / n`; both sides are mapped by
      `(Sigma^+)^{1/2}`. The inner products are `n P`, `n M^+ g` and
      `n |M^+ g|^2`.
    - `None`: unchanged.

    (arXiv:2603.12248, its code and its appendix.)

    Args:
        products: `InnerProducts` `[B, K, F, n, n]`.
        whitening: `"rollout"`, `"feature"` or `None`.

    Returns:
        `InnerProducts` `[B, K, n, n]`.

    Raises:
        ValueError: for an unknown `whitening`.
    """
    check_choice("whitening", whitening, WHITENINGS)
    if whitening == "rollout":
        products = _whiten_rollouts(products)
    elif whitening == "feature":
        products = _whiten_features(products)
    return InnerProducts(*(ops.sum(matrix, axis=2) for matrix in products))


def _whiten_rollouts(products: InnerProducts) -> InnerProducts:
    power = _spectral_powers(products.gram)
    root = power(-0.5)
    row_sum = ops.sum(root, axis=-1, keepdims=True)
    scale = ops.swapaxes(row_sum, -1, -2)
    return InnerProducts(
        power(0.0),
        ops.matmul(root, products.cross) * scale,
        products.target_gram * row_sum * scale,
    )


def _whiten_features(products: InnerProducts) -> InnerProducts:
    samples = products.gram.shape[-1]
    power = _spectral_powers(products.gram)
    coefficients = ops.matmul(power(-1.0), products.cross)
    square_norm = ops.sum(ops.square(coefficients), axis=-2, keepdims=True)
    return InnerProducts(
        samples * power(0.0),
        samples * coefficients,
        samples * ops.broadcast_to(square_norm, products.gram.shape),
    )


def _spectral_powers(matrix: Tensor) -> Callable[[float], Tensor]:
    """Function from an exponent to that power of a symmetric matrix.

    Powers act on the numerical range and are 0 outside it: exponent -1 gives the
    pseudo-inverse, exponent 0 the projection on the range.
    """
    values, vectors = ops.linalg.eigh(matrix)
    largest = ops.max(values, axis=-1, keepdims=True)
    kept = values > EIGENVALUE_CUTOFF * ops.maximum(largest, 0.0)
    safe = ops.where(kept, values, ops.ones_like(values))

    def power(exponent: float) -> Tensor:
        powers = ops.where(kept, ops.power(safe, exponent), ops.zeros_like(values))
        scaled = vectors * powers[..., None, :]
        return ops.matmul(scaled, ops.swapaxes(vectors, -1, -2))

    return power


def check_feature_shapes(generated: Sequence[int], target: Sequence[int]) -> None:
    """Raises a `ValueError` unless two shapes are those of features of blocks.

    Args:
        generated: tuple, to be `(B, n, K, F, D)`.
        target: tuple, to be `(B, K, F, D)`.
    """
    if len(generated) != 5:
        raise ValueError(
            "Expected `generated` of shape [B, n, K, F, D] (documents, samples, "
            f"blocks, features, width). Received: shape {generated}."
        )
    expected = (generated[0], *generated[2:])
    if target != expected:
        raise ValueError(
            f"Expected `target` of shape [B, K, F, D] = {expected}, to fit "
            f"`generated` of shape {generated}. Received: shape {target}."
        )
