"""What one step measures, and the Keras metrics that average it over steps."""

from collections.abc import Iterable
from typing import cast

import keras
from keras import ops

from keras_ebft.functional.masking import masked_mean
from keras_ebft.records import Experience, StepOutputs
from keras_ebft.typing import Tensor

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

    def result(self) -> Tensor:
        """The perplexity, float32 scalar."""
        return ops.exp(super().result())


class SkippedUpdates(keras.metrics.Metric):
    """Updates that were not finite and did not happen, since the epoch began.

    Their number in a row is counted across epochs.
    """

    def __init__(self, name: str = "skipped_updates") -> None:
        super().__init__(name=name)
        self.total, self.in_a_row = (
            self.add_variable((), initializer="zeros", dtype="int32", name=name)
            for name in ("total", "in_a_row")
        )

    def update_state(self, updated: Tensor) -> None:
        """Counts one step; `updated`, a bool scalar: whether it had an update."""
        skipped = 1 - ops.cast(updated, "int32")
        self.total.assign(self.total + skipped)
        self.in_a_row.assign((self.in_a_row + 1) * skipped)

    def result(self) -> Tensor:
        """How many there were, int32 scalar."""
        return ops.copy(self.total)

    def reset_state(self) -> None:
        """Begins an epoch."""
        self.total.assign(0)


def make_trackers(names: Iterable[str]) -> dict[str, keras.metrics.Metric]:
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


def measure_documents(outputs: StepOutputs) -> dict[str, tuple[Tensor, Tensor]]:
    """What is measured of the documents, with its weight in an average over steps.

    Args:
        outputs: `StepOutputs`.

    Returns:
        dict of `(value, weight)` float32 scalars by metric name.
    """
    weighted = (outputs.terms.ce_loss, ops.sum(outputs.document_scores.mask))
    return dict.fromkeys(DOCUMENT_MEASURES, weighted)


def measure_rollouts(outputs: StepOutputs) -> dict[str, tuple[Tensor, Tensor]]:
    """What is measured of the rollouts, with its weight in an average over steps.

    Args:
        outputs: `StepOutputs` with an `Experience`.

    Returns:
        dict of `(value, weight)` float32 scalars by metric name; weights are
        counts of live blocks (live tokens, where every token has a reward).
    """
    judged = cast(Experience, outputs.experience).judged
    # A block (or token) counts if any of its samples does.
    block_mask = ops.max(judged.mask, axis=1)

    def over_samples(values: Tensor) -> Tensor:
        return masked_mean(values, judged.mask)

    def over_blocks(values: Tensor) -> Tensor:
        return masked_mean(values, block_mask)

    reward, advantage = judged.reward, judged.advantage
    spread = ops.max(reward, axis=1) - ops.min(reward, axis=1)
    centred = advantage - over_samples(advantage)
    measured = {name: over_blocks(value) for name, value in judged.measures.items()}
    measured |= {
        "alignment": over_samples(judged.alignment),
        "diversity": over_samples(judged.diversity),
        "reward": over_samples(reward),
        "best_alignment": over_blocks(ops.max(judged.alignment, axis=1)),
        "best_reward": over_blocks(ops.max(reward, axis=1)),
        "advantage_std": ops.sqrt(over_samples(ops.square(centred))),
        "zero_std_fraction": over_blocks(ops.cast(spread < SAME_REWARD, "float32")),
    }
    terms = outputs.terms.measured()
    del terms["ce_loss"]
    live = ops.sum(block_mask)
    return {name: (value, live) for name, value in (measured | terms).items()}
