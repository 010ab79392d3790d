"""The numbers of one setting: how its signals go with what is good."""

import numpy as np

from keras_ebft.evaluation.audit.controls import CONTROLS
from keras_ebft.evaluation.audit.statistics import (
    ClusterBootstrap,
    as_correlation,
    as_mean,
    auc_parts,
    correlation_parts,
    gain_parts,
    mean_parts,
    varies,
)

STATISTICS = {
    "correlation": (correlation_parts, as_correlation),
    "auc": (auc_parts, as_mean),
    "gain": (gain_parts, as_mean),
}
# The truth must have the highest alignment of its block in so many of all blocks.
ENOUGH = 0.9


def measure(signals, qualities, documents, controls, sampling):
    """All of a row of the audit, in plain numbers.

    Args:
        signals: dict from `"alignment"`, `"reward"`, `"advantage"` to `[M, n]`.
        qualities: dict from names to `[M, n]`.
        documents: int array `[M]`.
        controls: `(alignment [C, 4], document [C])` of `CONTROLS`.
        sampling: `(resamples, seed)` of the bootstrap.

    Returns:
        dict of dicts of floats and `None`.
    """
    bootstrap = ClusterBootstrap(documents, *sampling)

    def mean(values):
        return bootstrap(mean_parts(values), as_mean).to_dict()

    measured = {
        name: {
            quality: {
                statistic: bootstrap(parts(signal, values), combine).to_dict()
                for statistic, (parts, combine) in STATISTICS.items()
            }
            for quality, values in qualities.items()
        }
        for name, signal in signals.items()
    }
    return {
        "blocks": len(documents),
        "documents": bootstrap.count,
        **measured,
        "oracle_gain": {
            name: bootstrap(gain_parts(values, values), as_mean).to_dict()
            for name, values in qualities.items()
        },
        "informative": {
            name: int(np.count_nonzero(varies(signals["reward"]) & varies(values)))
            for name, values in qualities.items()
        },
        "equal_rewards": mean(~varies(signals["reward"])),
        "equal_quality": {name: mean(~varies(v)) for name, v in qualities.items()},
        "controls": _controls(*controls, sampling),
    }


def _controls(alignment, documents, sampling):
    """Whether the truth wins; `passed` is `None` where there was nothing to try."""
    bootstrap = ClusterBootstrap(documents, *sampling)
    alignment = alignment.astype("float64")
    first = alignment[:, 0] > np.max(alignment[:, 1:], axis=1, initial=-np.inf)
    share = bootstrap(mean_parts(first), as_mean).to_dict()
    means = {
        name: bootstrap(mean_parts(alignment[:, i]), as_mean).to_dict()["value"]
        for i, name in enumerate(CONTROLS)
    }
    passed = None
    if len(alignment):
        highest = max(means.values()) == means["truth"]
        passed = bool(share["value"] >= ENOUGH and highest)
    return {
        "blocks": len(alignment),
        "truth_first": share,
        "alignment": means,
        "passed": passed,
    }
