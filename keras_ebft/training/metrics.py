"""What one step measures, and the Keras metrics that average it over steps."""

from collections.abc import Iterable
from typing import Any, cast

import keras
from keras import ops

from keras_ebft.functional.losses import count_sequences
from keras_ebft.functional.masking import masked_mean
from keras_ebft.layout.documents import take_tokens
from keras_ebft.records import Experience, Rollouts, StepOutputs
from keras_ebft.typing import Tensor

# Rewards closer together than this count as the same.
SAME_REWARD = 1e-6
NAN = float("nan")
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
# Those that came later stand behind all others: files of earlier versions hold the
# running means before them alone.
LATER_MEASURES = ("token_match", "live_block_fraction")
# Of a feature-matching reward alone.
MATCHING_MEASURES = ("matching_score",)
# Where there are stop tokens.
STOP_MEASURES = ("ended_fraction",)
DOCUMENT_MEASURES = ("ce_loss", "perplexity")


class Average(keras.metrics.Mean):
    """A mean that is NaN, and no perfect score, where nothing has been counted."""

    def result(self) -> Tensor:
        """The mean, float32 scalar."""
        return ops.where(self.count > 0, super().result(), NAN)


class Perplexity(Average):
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


class GradientNorm(Average):
    """Mean norm of the gradients, before any clipping, of updates that happened."""

    def __init__(self, name: str = "grad_norm") -> None:
        super().__init__(name=name)

    def count_update(self, updated: Tensor, norm: Tensor) -> None:
        """Adds one step; a norm that is not finite counts for nothing.

        Args:
            updated: bool scalar, whether it had an update.
            norm: float32 scalar.
        """
        counts = ops.logical_and(updated, ops.isfinite(norm))
        norm = ops.where(counts, norm, 0.0)
        self.update_state(norm, sample_weight=ops.cast(counts, "float32"))


class Deviation(keras.metrics.Metric):
    """Standard deviation over all that was seen, whatever the batches were."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.count, self.mean, self.squares = (
            self.add_variable((), initializer="zeros", name=part)
            for part in ("count", "mean", "squares")
        )

    def update_state(self, moments: tuple[Tensor, Tensor], sample_weight: Any) -> None:
        """Adds the mean and the variance of a batch, with their weight.

        The parallel update of Chan, Golub and LeVeque (1983): nothing is cancelled.
        """
        mean, variance = moments
        weight = ops.cast(sample_weight, "float32")
        share = ops.divide_no_nan(weight, self.count + weight)
        apart = mean - self.mean
        between = ops.square(apart) * self.count * share
        self.squares.assign(self.squares + variance * weight + between)
        self.mean.assign(self.mean + apart * share)
        self.count.assign(self.count + weight)

    def result(self) -> Tensor:
        """The deviation, float32 scalar; NaN where nothing has been counted."""
        found = ops.sqrt(ops.divide_no_nan(self.squares.value, self.count.value))
        return ops.where(self.count.value > 0, found, NAN)


class LossMean(keras.metrics.Metric):
    """The loss over all that was seen: the sum of its terms' means.

    Each term is weighed by what it is a mean of (tokens, sequences), so that the
    value does not depend on how documents were put into batches.

    Args:
        terms: names of the terms.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        super().__init__(name="loss")
        # Sum and weight of each term.
        self.sums = {
            term: [
                self.add_variable((), initializer="zeros", name=f"{term}_{part}")
                for part in ("total", "count")
            ]
            for term in terms
        }

    def update_state(self, loss: Tensor, sample_weight: Any = None) -> None:
        """Nothing: Keras would count rows that fill a batch up as documents."""

    def add(self, term: str, value: Tensor, weight: Tensor | float) -> None:
        """Adds one step's term, weighted as in the loss."""
        weight = ops.cast(weight, "float32")
        for variable, more in zip(self.sums[term], (value * weight, weight)):
            variable.assign(variable + more)

    def result(self) -> Tensor:
        """The loss, float32 scalar; NaN where nothing has been counted."""
        means = [
            ops.divide_no_nan(total.value, count.value)
            for total, count in self.sums.values()
        ]
        counts = sum(count.value for _, count in self.sums.values())
        return ops.where(counts > 0, sum(means), NAN)


def make_trackers(names: Iterable[str]) -> dict[str, keras.metrics.Metric]:
    """One Keras metric per measured quantity.

    Args:
        names: names of the quantities.

    Returns:
        dict of `keras.metrics.Metric` by name.
    """
    special = {"perplexity": Perplexity, "advantage_std": Deviation}
    return {name: special.get(name, Average)(name=name) for name in names}


def term_weights(outputs: StepOutputs) -> dict[str, Tensor]:
    """What each term of the loss is a mean over, counted in one step.

    Args:
        outputs: `StepOutputs`.

    Returns:
        dict of float32 scalars by name of the term.
    """
    weights = {
        "ce_loss": ops.sum(outputs.document_scores.mask),
        "regularization": ops.ones(()),
    }
    if outputs.experience is None:
        return weights
    rollouts, judged = outputs.experience.rollouts, outputs.experience.judged
    counted = ops.cast(rollouts.counted, "float32")
    tokens = ops.sum(counted)
    live = ops.sum(ops.max(judged.mask, axis=1))
    return weights | {
        "policy_loss": count_sequences(counted, rollouts.blocks.starts),
        "entropy": tokens,
        "kl": tokens,
        "critic_loss": live,
        "critic_accuracy": live,
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


def measure_rollouts(outputs: StepOutputs) -> dict[str, tuple[Any, Tensor]]:
    """What is measured of the rollouts, with its weight in an average over steps.

    Args:
        outputs: `StepOutputs` with an `Experience`.

    Returns:
        dict of `(value, weight)` float32 scalars by metric name (of `advantage_std`
        the value is mean and variance); weights count what the value is a mean
        of: live blocks (live tokens, where every token has a reward), rollouts,
        tokens or sequences.
    """
    rollouts, _, judged, _ = cast(Experience, outputs.experience)
    # A block (or token) counts if any of its samples does.
    block_mask = ops.max(judged.mask, axis=1)

    def over_samples(values: Tensor) -> Tensor:
        return masked_mean(values, judged.mask)

    def over_blocks(values: Tensor) -> Tensor:
        return masked_mean(values, block_mask)

    def best(values: Tensor) -> Tensor:
        """The largest of the samples that count, 0 where none does."""
        counts = ops.cast(judged.mask, "bool")
        largest = ops.max(ops.where(counts, values, float("-inf")), axis=1)
        return ops.where(ops.any(counts, axis=1), largest, 0.0)

    reward, advantage = judged.reward, judged.advantage
    spread = best(reward) + best(-reward)
    mean = over_samples(advantage)
    moments = mean, over_samples(ops.square(advantage - mean))
    measured = {name: over_blocks(value) for name, value in judged.measures.items()}
    # `|phi_*|^2 - |E[phi] - phi_*|^2` on average, of features as they are rewarded.
    score = judged.alignment - 0.5 * judged.diversity
    measured |= {
        "matching_score": over_samples(score),
        "alignment": over_samples(judged.alignment),
        "diversity": over_samples(judged.diversity),
        "reward": over_samples(reward),
        "best_alignment": over_blocks(best(judged.alignment)),
        "best_reward": over_blocks(best(reward)),
        "advantage_std": moments,
        "zero_std_fraction": over_blocks(ops.cast(spread < SAME_REWARD, "float32")),
    }
    live, samples = ops.sum(block_mask), ops.sum(judged.mask)
    of_samples = ("matching_score", "alignment", "diversity", "reward", "advantage_std")
    weighed: dict[str, tuple[Any, Tensor]] = {
        name: (value, samples if name in of_samples else live)
        for name, value in measured.items()
    }
    weights = term_weights(outputs)
    for name, value in outputs.terms.measured().items():
        if name != "ce_loss":
            weighed[name] = (value, weights[name])
    return weighed | _measure_tokens(rollouts)


def _measure_tokens(rollouts: Rollouts) -> dict[str, tuple[Tensor, Tensor]]:
    """What the tokens of rollouts say by themselves, and where blocks live."""
    documents, blocks = rollouts.documents, rollouts.blocks
    live = ops.cast(blocks.live, "float32")
    has_tokens = ops.cast(ops.any(documents.padding_mask, axis=-1), "float32")
    places = ops.sum(has_tokens) * live.shape[1]
    truth = take_tokens(documents.token_ids, blocks.true_index)[:, None]
    known = ops.logical_and(rollouts.counted, blocks.true_exists[:, None])
    known = ops.cast(known, "float32")
    same = ops.cast(rollouts.token_ids == truth, "float32")
    found = {
        "token_match": (masked_mean(same, known), ops.sum(known)),
        "live_block_fraction": (ops.divide_no_nan(ops.sum(live), places), places),
    }
    if rollouts.ended is not None:
        mask = ops.broadcast_to(live[:, None], rollouts.ended.shape)
        share = masked_mean(ops.cast(rollouts.ended, "float32"), mask)
        found["ended_fraction"] = (share, ops.sum(mask))
    return found
