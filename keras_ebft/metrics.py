"""What one step measures, and the Keras metrics that average it over steps."""

import keras
from keras import ops

from keras_ebft.functional import masked_mean, mean_over_live, policy_loss

# Rewards closer together than this count as the same.
SAME_REWARD = 1e-6


class Perplexity(keras.metrics.Mean):
    """Exponential of the mean cross-entropy over all tokens seen."""

    def result(self):
        """The perplexity, float32 scalar."""
        return ops.exp(super().result())


def make_trackers(block_measures):
    """One Keras metric per measured quantity.

    Args:
        block_measures: names of the reward's own measures per block.

    Returns:
        dict of `keras.metrics.Metric` by name.
    """
    names = (
        *block_measures,
        "alignment",
        "diversity",
        "reward",
        "best_alignment",
        "best_reward",
        "advantage_std",
        "zero_std_fraction",
        "policy_loss",
        "ce_loss",
        "entropy",
    )
    trackers = {name: keras.metrics.Mean(name=name) for name in names}
    return {**trackers, "perplexity": Perplexity(name="perplexity")}


def token_mask(outputs):
    """1 for every generated token of a live block, `[B, n, K, G]` float32."""
    mask = outputs["block_mask"][:, None, :, None]
    return ops.broadcast_to(mask, outputs["log_prob"].shape)


def loss_terms(outputs):
    """The terms of the loss, before their weights.

    Args:
        outputs: dict from `EBFTModel.call`.

    Returns:
        dict of float32 scalars: `policy_loss`, `ce_loss`.
    """
    mask = token_mask(outputs)
    per_sequence = policy_loss(outputs["log_prob"], outputs["advantage"], mask)
    return {
        "policy_loss": mean_over_live(per_sequence, mask),
        "ce_loss": masked_mean(-outputs["document_log_prob"], outputs["document_mask"]),
    }


def measure(outputs, block_measures):
    """Every quantity of one step, with its weight in an average over steps.

    Args:
        outputs: dict from `EBFTModel.call`.
        block_measures: names of the reward's own measures per block.

    Returns:
        dict of `(value, weight)` float32 scalars by metric name; weights are
        counts of live blocks or of document tokens.
    """
    block_mask = outputs["block_mask"]
    live = ops.sum(block_mask)
    tokens = ops.sum(outputs["document_mask"])
    terms = loss_terms(outputs)

    def over_samples(values):
        return masked_mean(values, block_mask[:, None, :])

    def over_blocks(values):
        return masked_mean(values, block_mask)

    reward, advantage = outputs["reward"], outputs["advantage"]
    spread = ops.max(reward, axis=1) - ops.min(reward, axis=1)
    centred = advantage - over_samples(advantage)
    measured = {name: over_blocks(outputs[name]) for name in block_measures}
    measured |= {
        "alignment": over_samples(outputs["alignment"]),
        "diversity": over_samples(outputs["diversity"]),
        "reward": over_samples(reward),
        "best_alignment": over_blocks(ops.max(outputs["alignment"], axis=1)),
        "best_reward": over_blocks(ops.max(reward, axis=1)),
        "advantage_std": ops.sqrt(over_samples(ops.square(centred))),
        "zero_std_fraction": over_blocks(ops.cast(spread < SAME_REWARD, "float32")),
        "policy_loss": terms["policy_loss"],
        "entropy": masked_mean(outputs["entropy"], token_mask(outputs)),
    }
    weighted = {name: (value, live) for name, value in measured.items()}
    weighted["ce_loss"] = weighted["perplexity"] = (terms["ce_loss"], tokens)
    return weighted
