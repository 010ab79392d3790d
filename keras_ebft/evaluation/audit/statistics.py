"""How a signal of rollouts goes with their quality, within blocks, in NumPy.

Arrays are `[M, n]`: M blocks of n rollouts. Only rollouts of one block are ever
compared with each other. Every statistic is a ratio (or a ratio with a root) of sums
over blocks, so that a bootstrap adds up parts of documents and never looks at rollouts
again.
"""

from typing import NamedTuple

import numpy as np

# Numbers of one block closer together than this count as the same.
SAME = 1e-6


class Estimate(NamedTuple):
    """A value and its interval; NaN where nothing can be said.

    Attributes:
        value: float.
        low: float, lower end of the interval.
        high: float.
        error: float, standard deviation over resamples.
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    error: float = np.nan

    def to_dict(self):
        """The same in plain numbers, `None` where nothing can be said."""
        numbers = self._asdict().items()
        return {k: float(v) if np.isfinite(v) else None for k, v in numbers}


class ClusterBootstrap:
    """Intervals by drawing whole documents with replacement.

    Blocks of one document resemble each other; drawn one by one they would pretend to
    know more than there is.

    Args:
        clusters: int array `[M]`, the document of each block.
        resamples: int.
        seed: int.
        level: float, of the intervals.
    """

    def __init__(self, clusters, resamples=1000, seed=0, level=0.95):
        _, self.index = np.unique(clusters, return_inverse=True)
        self.count = int(self.index.max(initial=-1)) + 1
        self.tails = [50.0 * (1.0 - level), 50.0 * (1.0 + level)]
        random = np.random.default_rng(seed)
        even = np.full(self.count, 1.0 / max(self.count, 1))
        self.draws = (
            random.multinomial(self.count, even, size=resamples).astype("float64")
            if self.count > 1
            else np.zeros((0, self.count))
        )

    def __call__(self, parts, combine):
        """Value and interval of a statistic.

        Args:
            parts: float array `[M, P]`, what each block adds to its sums.
            combine: function from sums `[..., P]` to the statistic `[...]`.

        Returns:
            `Estimate`.
        """
        sums = np.zeros((self.count, parts.shape[1]))
        np.add.at(sums, self.index, parts)
        value = float(combine(sums.sum(axis=0)))
        drawn = combine(self.draws @ sums)
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(value) or not len(drawn):
            return Estimate(value)
        low, high = np.percentile(drawn, self.tails)
        return Estimate(value, float(low), float(high), float(np.std(drawn)))


def varies(values):
    """Which blocks tell their rollouts apart, bool `[M]`.

    Args:
        values: float array `[M, n]`.
    """
    return np.ptp(values, axis=1) > SAME


def correlation_parts(signal, quality):
    """Of the correlation within blocks: both sides centred on their block's mean.

    Blocks where either does not vary say nothing and are left out.

    Args:
        signal: float array `[M, n]`.
        quality: float array `[M, n]`.

    Returns:
        float64 array `[M, 3]`, for `as_correlation`.
    """
    x, y = (_centred(values) for values in (signal, quality))
    both = varies(signal) & varies(quality)
    sums = np.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], axis=1)
    return np.where(both[:, None], sums, 0.0)


def as_correlation(sums):
    """`sum xy / sqrt(sum xx sum yy)`."""
    return _ratio(sums[..., 0], np.sqrt(sums[..., 1] * sums[..., 2]))


def auc_parts(signal, quality):
    """Of the share of pairs, one better than the other, that the signal ranks so.

    Pairs are of one block; where the signal is equal they count half.

    Args:
        signal: float array `[M, n]`.
        quality: float array `[M, n]`.

    Returns:
        float64 array `[M, 2]`, for `as_mean`.
    """
    signal, quality = (np.asarray(v, dtype="float64") for v in (signal, quality))
    better = quality[:, :, None] > quality[:, None, :] + SAME
    apart = signal[:, :, None] - signal[:, None, :]
    right = np.where(np.abs(apart) <= SAME, 0.5, apart > 0.0)
    return np.stack([(better * right).sum((1, 2)), better.sum((1, 2))], axis=1)


def gain_parts(signal, quality):
    """Of the quality of the rollout that the signal likes best, above the mean.

    Where it likes several equally, their mean counts.

    Args:
        signal: float array `[M, n]`.
        quality: float array `[M, n]`; given as `signal` too, it is the oracle.

    Returns:
        float64 array `[M, 2]`, for `as_mean`.
    """
    signal, quality = (np.asarray(v, dtype="float64") for v in (signal, quality))
    top = signal >= signal.max(axis=1, keepdims=True) - SAME
    chosen = (top * quality).sum(axis=1) / top.sum(axis=1)
    return np.stack([chosen - quality.mean(axis=1), np.ones(len(quality))], axis=1)


def mean_parts(values):
    """Of a mean over blocks, from one number per block, `[M]`."""
    values = np.asarray(values, dtype="float64")
    return np.stack([values, np.ones(len(values))], axis=1)


def as_mean(sums):
    """`sum / count`."""
    return _ratio(sums[..., 0], sums[..., 1])


def _centred(values):
    values = np.asarray(values, dtype="float64")
    return values - values.mean(axis=1, keepdims=True)


def _ratio(above, below):
    above, below = np.asarray(above), np.asarray(below)
    nothing = np.full(np.shape(above), np.nan)
    return np.divide(above, below, out=nothing, where=below > 0.0)
