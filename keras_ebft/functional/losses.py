"""The terms of the loss, each defined once, in plain `keras.ops`.

Axes: B rows, n samples, K blocks, G generated tokens per block. Source of the
equations: Jelassi et al., 2026, "Matching Features, Not Tokens",
arXiv:2603.12248, except where another is named.
"""

from keras import ops

from keras_ebft.functional.masking import masked_mean, only_where, weighted_sum
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice

KL_ESTIMATORS = ("k1", "k2", "k3")
POLICY_LOSSES = ("token", "sequence")
KL_BOUND = 10.0
# Ratios above exp(20) count as exp(20): no step is worth more, and float32 ends at
# exp(88), from where on the gradient would be that of infinity.
LOG_RATIO_BOUND = 20.0


def token_weights(token_mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """What each generated token contributes to a mean over rollout sequences.

    A sequence is one sample of one document: the counted tokens of its blocks.
    Tokens are averaged within their sequence, then sequences are averaged; the
    weights of all tokens sum to 1, or to 0 if none counts.

    Args:
        token_mask: float32 tensor `[B, n, K, G]`, 1 where a token counts.
        starts: int32 tensor `[B, K]`, tells the documents of a row apart by where
            they start; `None` if every row is one document.

    Returns:
        float32 tensor `[B, n, K, G]`.

    Example:
    >>> import numpy as np
    >>> mask = np.array([1.0, 1.0, 0.0, 1.0], "float32").reshape(1, 2, 1, 2)
    >>> np.ravel(ops.convert_to_numpy(token_weights(mask))).tolist()
    [0.25, 0.25, 0.0, 0.5]
    """
    token_mask = ops.convert_to_tensor(token_mask)
    of_block, of_sequence = _tokens_of_sequences(token_mask, starts)
    sequences = ops.sum(of_block / of_sequence)
    return token_mask / of_sequence[..., None] / ops.maximum(sequences, 1.0)


def count_sequences(token_mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """How many rollout sequences have a token that counts, float32 scalar.

    Args:
        token_mask: as of `token_weights`.
        starts: as of `token_weights`.
    """
    of_block, of_sequence = _tokens_of_sequences(token_mask, starts)
    return ops.sum(of_block / of_sequence)


def _tokens_of_sequences(
    token_mask: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Counted tokens of each block, and of its sequence but 1 at least."""
    of_block = ops.sum(ops.convert_to_tensor(token_mask), axis=-1)
    if starts is None:
        of_sequence = ops.sum(of_block, axis=-1, keepdims=True)
    else:
        same = ops.cast(starts[:, :, None] == starts[:, None, :], "float32")
        of_sequence = ops.matmul(of_block, same)
    return of_block, ops.maximum(of_sequence, 1.0)


def probability_ratio(
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    token_mask: Tensor,
    kind: str = "token",
) -> Tensor:
    """How much likelier the policy makes its rollouts than when it sampled them.

    - `"token"`: `exp(logp - logp_old)` of each token;
    - `"sequence"`: `exp(mean_t (logp_t - logp_old_t))` over the counted tokens of
      a rollout, the same for all of them (GSPO, arXiv:2507.18071).

    At most `exp(20)`, where the gradient is 0, and 1 for tokens that do not count,
    whatever their log-probabilities are.

    Args:
        log_prob: float32 tensor `[B, n, K, G]`, with gradient.
        old_log_prob: float32 tensor `[B, n, K, G]`, or `None` for the value of
            `log_prob` itself: the ratio is then 1, its gradient that of `log_prob`.
        token_mask: float32 tensor `[B, n, K, G]`.
        kind: `"token"` or `"sequence"`.

    Returns:
        float32 tensor `[B, n, K, G]`.

    Raises:
        ValueError: for an unknown `kind`.
    """
    check_choice("policy_loss", kind, POLICY_LOSSES)
    log_prob = ops.convert_to_tensor(log_prob)
    old = log_prob if old_log_prob is None else ops.convert_to_tensor(old_log_prob)
    # Before the exponential: behind it, 0 times infinity would reach the gradient.
    difference = only_where(token_mask, log_prob - ops.stop_gradient(old))
    if kind == "sequence":
        mean = masked_mean(difference, token_mask, axis=-1)
        difference = ops.broadcast_to(mean[..., None], difference.shape)
    return ops.exp(ops.minimum(difference, LOG_RATIO_BOUND))


def policy_loss(
    ratio: Tensor,
    advantage: Tensor,
    weights: Tensor,
    clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Policy-gradient loss.

        - sum_t weight_t * ratio_t * A_t
        - sum_t weight_t * min(ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t)

    the second with `clip_range=(low, high)` (PPO, arXiv:1707.06347).

    Args:
        ratio: float32 tensor `[B, n, K, G]` from `probability_ratio`.
        advantage: float32 tensor `[B, n, K]`, for all tokens of a block, or
            `[B, n, K, G]`; no gradient flows into it.
        weights: float32 tensor `[B, n, K, G]` from `token_weights`.
        clip_range: `(low, high)` or `None`.

    Returns:
        float32 scalar.
    """
    ratio, weights = ops.convert_to_tensor(ratio), ops.convert_to_tensor(weights)
    advantage = ops.stop_gradient(ops.convert_to_tensor(advantage))
    if len(advantage.shape) < len(ratio.shape):
        advantage = advantage[..., None]
    ratio = only_where(weights, ratio)
    gain = ratio * only_where(weights, advantage)
    if clip_range is not None:
        low, high = clip_range
        gain = ops.minimum(gain, ops.clip(ratio, 1.0 - low, 1.0 + high) * advantage)
    return -weighted_sum(gain, weights)


def kl_estimate(
    log_prob: Tensor, ref_log_prob: Tensor, estimator: str = "k2"
) -> Tensor:
    """Estimates of KL(policy || reference) from samples of the policy.

    With `d = log_prob - ref_log_prob`:

        k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

    clipped to [-10, 10], as in the authors' code.

    Args:
        log_prob: float tensor, log-probabilities under the policy, in nats.
        ref_log_prob: float tensor of the same shape, under the reference.
        estimator: `"k1"`, `"k2"` or `"k3"`.

    Returns:
        float32 tensor of the same shape.

    Raises:
        ValueError: for an unknown `estimator`.

    Example:
    >>> import numpy as np
    >>> float(kl_estimate(np.float32(-1.0), np.float32(-3.0), "k2"))
    2.0
    """
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
    difference = ops.cast(log_prob, "float32") - ops.cast(ref_log_prob, "float32")
    # Every estimate beyond is clipped, and the exponential stays finite.
    difference = ops.clip(difference, -2.0 * KL_BOUND, 2.0 * KL_BOUND)
    if estimator == "k1":
        estimate = difference
    elif estimator == "k2":
        estimate = ops.square(difference) / 2.0
    else:
        estimate = ops.exp(-difference) - 1.0 + difference
    return ops.clip(estimate, -KL_BOUND, KL_BOUND)
