"""What one step measures, and the Keras metrics that average it over steps."""

import keras
from keras import ops

from keras_ebft.functional.masking import masked_mean

# Rewards closer together than this count as the same.
SAME_REWARD = 1e-6
REWARD_MEASURES = (
    "alignment",
    "diversity",
    "reward",
    "best_alignment",
    "best_reward",
    "advantage_std",
    "zero_std_fraction",
    "policy_loss",
    "entropy",
)
CRITIC_MEASURES = ("critic_loss", "critic_accuracy")
DOCUMENT_MEASURES = ("ce_loss", "perplexity")


class Perplexity(keras.metrics.Mean):
    """Exponential of the mean cross-entropy over all tokens seen."""

    def result(self):
        """The perplexity, float32 scalar."""
        return ops.exp(super().result())


def make_trackers(names):
    """One Keras metric per measured quantity.

    Args:
        names: names of the quantities.

    Returns:
        dict of `keras.metrics.Metric` by name.
    """
    return {
        name: Perplexity(name=name)
        if name == "perplexity"
        else keras.metrics.Mean(name=name)
        for name in names
    }


def measure_documents(outputs, terms):
    """What is measured of the documents, with its weight in an average over steps.

    Args:
        outputs: dict from `EBFTModel.call`.
        terms: dict of loss terms.

    Returns:
        dict of `(value, weight)` float32 scalars by metric name.
    """
    weighted = (terms["ce_loss"], ops.sum(outputs["document_mask"]))
    return dict.fromkeys(DOCUMENT_MEASURES, weighted)


def measure_rollouts(outputs, terms, block_measures):
    """What is measured of the rollouts, with its weight in an average over steps.

    Args:
        outputs: dict from `EBFTModel.call`.
        terms: dict of loss terms.
        block_measures: names of the reward's own measures per block.

    Returns:
        dict of `(value, weight)` float32 scalars by metric name; weights are
        counts of live blocks (live tokens, where every token has a reward).
    """
    mask = outputs["reward_mask"]
    # A block (or token) counts if any of its samples does.
    block_mask = ops.max(mask, axis=1)

    def over_samples(values):
        return masked_mean(values, mask)

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
    }
    for name in ("policy_loss", "entropy", "kl", *CRITIC_MEASURES):
        if name in terms:
            measured[name] = terms[name]
    live = ops.sum(block_mask)
    return {name: (value, live) for name, value in measured.items()}
