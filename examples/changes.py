"""What changed on held-out documents, as a table and as a picture, with its noise."""

import matplotlib
import numpy as np

from keras_ebft.evaluation import paired_change

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURES = {
    "feature_matching_loss": "feature-matching loss",
    "alignment": "alignment with the truth",
    "token_match": "tokens that are the true ones",
    "cross_entropy": "cross-entropy (nats/token)",
}


def spread(rows, count):
    """Some rows from all over the data, as a dict of arrays."""
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return {name: values[chosen] for name, values in rows.arrays.items()}


def is_lower_better(name):
    """Whether a measure should fall."""
    return "loss" in name or "entropy" in name


def compared(before, after):
    """Both without the documents that have no value, as rows without a block."""
    has_value = ~np.isnan(before)
    return before[has_value], after[has_value]


def report(before, after, labels=MEASURES):
    """A table: held-out means, and paired differences with their noise.

    Args:
        before: dict of float arrays `[N]`, one value per document, prompt or row, NaN
            where there is none. N may differ from measure to measure.
        after: dict from a method's name to such a dict.
        labels: dict from the name of a measure to what it is called.
    """
    print(
        f"\n{'held-out':34}{'of':>5}{'before':>9}" + "".join(f"{m:>30}" for m in after)
    )
    for name, label in labels.items():
        first, _ = compared(before[name], before[name])
        line = f"{label:34}{len(first):5}{first.mean():9.4f}"
        for measured in after.values():
            first, second = compared(before[name], measured[name])
            change = paired_change(first, second)
            mark = " *" if change.is_visible else "  "
            line += (
                f"{second.mean():.4f} "
                f"({change.mean:+.4f} ±{change.half_width:.4f}){mark}"
            ).rjust(30)
        print(line)
    print(
        "In brackets the mean difference, each row or prompt paired with itself, and "
        "half of\nits 95 % interval; * where that leaves out 0. Losses and "
        "cross-entropies should fall,\nthe others rise."
    )


def plot(before, after, path, labels=MEASURES, columns=4):
    """Paired differences with their intervals, one panel per measure."""
    rows = -(-len(labels) // columns)
    columns = min(columns, len(labels))
    size = 3.0 * columns, 3.4 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="tight")
    axes = np.ravel(axes)
    for axis, (name, label) in zip(axes, labels.items()):
        for place, (method, measured) in enumerate(after.items()):
            mean, half = paired_change(*compared(before[name], measured[name]))
            axis.errorbar(place, mean, yerr=half, fmt="o", capsize=6, label=method)
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(after)), list(after))
        axis.set_xlim(-0.5, len(after) - 0.5)
        better = "lower" if is_lower_better(name) else "higher"
        axis.set_title(f"{label}\n({better} is better)", fontsize=9)
        axis.grid(alpha=0.3, axis="y")
    for axis in axes[len(labels) :]:
        axis.remove()
    axes[0].set_ylabel("change on held-out rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
