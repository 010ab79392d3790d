"""Pictures of training runs and of the geometry. Each returns a matplotlib figure.

Figures are made without `pyplot`: nothing is shown or kept open, and no display is
needed. In a notebook a figure as the last line of a cell shows itself. They need
`pip install "keras_ebft[plots]"`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_ebft.layout.geometry import BlockGeometry
from keras_ebft.validation import check_instance

LABELS = {
    "feature_matching_loss": "feature-matching loss",
    "unbiased_feature_matching_loss": "feature-matching loss",
    "whitened_feature_matching_loss": "whitened feature-matching loss",
    "ce_loss": "cross-entropy (nats/token)",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def training_curves(
    runs: Any,
    metrics: Sequence[str] = ("feature_matching_loss", "ce_loss"),
    before: Any = None,
) -> Any:
    """One panel per metric, one line per run, training dashed.

    Args:
        runs: dict from a run's name to its history: a `keras.callbacks.History`,
            or a dict from metric names to lists of values, one per epoch. Values
            of `val_<metric>` are drawn solid.
        metrics: tuple of metric names.
        before: dict from a run's name to a dict of what `evaluate` measured before
            training, drawn as epoch 0 of the solid line; or `None`.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no run, no run has one of the metrics, or `before`
            names a run that is not there.

    Example:
    ```python
    start = model.evaluate(held_out, return_dict=True)
    history = model.fit(rows, validation_data=held_out)
    figure = keras_ebft.plots.training_curves({"EBFT": history}, before={"EBFT": start})
    figure.savefig("curves.png")
    ```
    """
    histories = {
        name: getattr(run, "history", run) for name, run in _not_empty("runs", runs)
    }
    before = before or {}
    unknown = sorted(set(before) - set(histories))
    if unknown:
        raise ValueError(
            f"Expected `before` with names of `runs`, {sorted(histories)}. Received: "
            f"{', '.join(unknown)}. Use the same names in both."
        )
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics):
        drawn = 0
        for number, (name, history) in enumerate(histories.items()):
            start = before.get(name, {}).get(metric)
            for epochs, values, style, suffix in _curves(history, metric, start):
                label = name + suffix
                axis.plot(epochs, values, style, color=f"C{number}", label=label)
                drawn += 1
        if not drawn:
            raise ValueError(
                f"Expected a run with {metric!r}. Received: runs with "
                f"{sorted({key for h in histories.values() for key in h})}."
            )
        _finish(axis, "epoch", LABELS.get(metric, metric))
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _curves(history: Any, metric: str, start: Any) -> Any:
    """`(epochs, values, style, suffix)` of what a history has of a metric."""
    curves = []
    if metric in history:
        curves.append((1, history[metric], "--", ", training"))
    if f"val_{metric}" in history:
        values = history[f"val_{metric}"]
        measured = [] if start is None else [start]
        curves.append((1 - len(measured), [*measured, *values], "-", ""))
    for first, values, style, suffix in curves:
        yield np.arange(first, first + len(values)), values, style, suffix


def accuracy_plane(
    points: Any,
    accuracy_label: str = "accuracy",
    likelihood_label: str = "validation cross-entropy (nats/token)",
    joined: bool = True,
) -> Any:
    """Accuracy against validation cross-entropy, the plane of the paper's Figure 1.

    Better is up and to the left. Every method has a shape of its own, open so that
    points at the same place are all seen.

    Args:
        points: dict from a method's name to `(cross-entropy, accuracy)` or a list
            of such pairs; nats per token, share in [0, 1].
        accuracy_label: str.
        likelihood_label: str, says of which documents the cross-entropy is.
        joined: bool, whether the points of one method are joined in their order, as
            checkpoints have one and seeds have none.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no point, or one is no pair of numbers.
    """
    figure, (axis,) = _figure(1)
    named = _not_empty("points", points)
    for (name, given), marker in zip(named, itertools.cycle(MARKERS)):
        pairs = np.atleast_2d(np.asarray(given, dtype="float64"))
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(
                "Expected pairs (cross-entropy, accuracy). Received: an array of "
                f"shape {pairs.shape} for {name!r}."
            )
        (line,) = axis.plot(pairs[:, 0], pairs[:, 1], marker, label=name)
        line.set(fillstyle="none", linestyle="-" if joined else "none")
    # Likelihoods that differ little have long labels.
    axis.locator_params("x", nbins=5)
    _finish(axis, likelihood_label, accuracy_label, legend=False)
    # Beside the points: any place among them may hide one.
    figure.legend(loc="outside right upper")
    figure.set_size_inches(7.0, 3.6)
    return figure


def rollout_length_curves(losses: Any, label: str = "feature-matching loss") -> Any:
    """Feature-matching loss against rollout length, one line per model.

    Args:
        losses: dict from a model's name to a dict from rollout length in tokens
            to loss.
        label: str, of the vertical axis.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no model or no length.
    """
    figure, (axis,) = _figure(1)
    for name, by_length in _not_empty("losses", losses):
        lengths = sorted(length for length, _ in _not_empty(name, by_length))
        axis.plot(lengths, [by_length[g] for g in lengths], "o-", label=name)
        axis.set_xticks(lengths)
    _finish(axis, "rollout length (tokens)", label)
    return figure


def geometry(block_geometry: BlockGeometry) -> Any:
    """Document, anchors and rollouts, and who attends to whom.

    Args:
        block_geometry: `BlockGeometry`; a short one can be read best.

    Returns:
        `matplotlib.figure.Figure` with two panels.

    Raises:
        TypeError: if it is something else.
    """
    check_instance(
        "block_geometry",
        block_geometry,
        BlockGeometry,
        "Pass for example BlockGeometry(32).",
    )
    figure, (layout, mask) = _figure(2)
    _draw_layout(layout, block_geometry)
    mask.imshow(block_geometry.attention_mask(), cmap="Greys", interpolation="nearest")
    edge = block_geometry.length - 0.5
    mask.axhline(edge, color="C0", linewidth=0.8)
    mask.axvline(edge, color="C0", linewidth=0.8)
    mask.set(
        title="attention mask of one sample",
        xlabel="attended to: document, then blocks",
        ylabel="token",
    )
    return figure


def _draw_layout(axis: Any, block_geometry: BlockGeometry) -> None:
    length, steps = block_geometry.length, block_geometry.rollout_length
    axis.broken_barh([(0, length)], (-0.4, 0.8), color="0.8", label="document")
    for block, anchor in enumerate(block_geometry.anchors):
        seen = axis.broken_barh([(0, anchor)], (block + 0.6, 0.8), color="0.93")
        rollout = axis.broken_barh([(anchor, steps)], (block + 0.6, 0.8), color="C1")
        if block == 0:
            seen.set_label("context of a block")
            rollout.set_label("rollout")
        axis.plot([anchor, anchor], [-0.4, block + 1.4], color="C0", linewidth=0.8)
    axis.plot([], [], color="C0", linewidth=0.8, label="anchor")
    axis.invert_yaxis()
    axis.set_yticks(range(block_geometry.num_blocks + 1))
    axis.set_yticklabels(["text", *range(block_geometry.num_blocks)])
    axis.set(xlabel="position (tokens)", ylabel="block", title="where blocks stand")
    axis.figure.legend(loc="outside lower left", ncols=4)


def reward_audit(result: Any) -> Any:
    """How the advantage goes with what is good, one line per setting, best on top.

    Args:
        result: `keras_ebft.evaluation.AuditResult`.

    Returns:
        `matplotlib.figure.Figure` with a panel per quality: correlations within
        blocks with their intervals, filled of the advantage, hollow of the alignment
        alone. Settings whose controls failed are grey.

    Raises:
        ValueError: if there is no setting.
    """
    from matplotlib.figure import Figure

    if not result.rows:
        raise ValueError("Expected an audit of at least one setting. Received: none.")
    names = list(result.rows[0]["advantage"])
    size = (2.6 + 2.3 * len(names), 1.5 + 0.27 * len(result.rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = np.ravel(figure.subplots(1, len(names), sharey=True, sharex=True))
    for axis, name in zip(panels, names):
        for place, row in enumerate(result.rows):
            _draw_audited(axis, place, row, name)
        axis.axvline(0.0, color="0.3", linewidth=0.8)
        axis.set_title(AUDITED.get(name, name), fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(result.rows)))
    panels[0].set_yticklabels([_audited_label(row) for row in result.rows])
    panels[0].set_ylim(len(result.rows) - 0.5, -0.5)
    for label, style in AUDIT_STYLES.items():
        panels[0].plot([], [], color="C0", label=label, **style)
    figure.supxlabel(
        "correlation within blocks (settings: layers, pooling, whitening; * the "
        "model's own)",
        fontsize=9,
    )
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


AUDITED = {
    "share": "share of true tokens",
    "prefix": "length of true prefix",
    "last": "last token is true",
}
AUDIT_STYLES = {
    "advantage, 95 % interval": {"marker": "o", "markersize": 4, "linewidth": 1.4},
    "alignment alone": {
        "marker": "o",
        "markersize": 5,
        "markerfacecolor": "white",
        "linestyle": "none",
    },
}


def _draw_audited(axis: Any, place: int, row: dict, name: str) -> None:
    color = "0.6" if row["controls"]["passed"] is False else "C0"
    both, alone = AUDIT_STYLES.values()
    alignment = row["alignment"][name]["correlation"]["value"]
    if alignment is not None:
        axis.plot([alignment], [place + 0.18], color=color, **alone)
    found = row["advantage"][name]["correlation"]
    if found["value"] is not None:
        axis.plot([found["value"]], [place - 0.12], color=color, **both)
    if found["low"] is not None:
        ends = [found["low"], found["high"]]
        axis.plot(ends, [place - 0.12] * 2, color=color, linewidth=1.4)


def _audited_label(row: dict) -> str:
    given = row["tapped"] if row["layers"] is None else row["layers"]
    layers = "+".join(f"{n:g}" for n in given) or "own"
    mode = "" if row["mode"] in ("concat", "callable") else f" {row['mode']}"
    own = " *" if row["of_the_model"] else ""
    whitening = row["whitening"] or "none"
    return f"{layers}{mode}, {row['pooling']}, {whitening}{own}"


def _figure(panels: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Expected the package matplotlib, which draws. Received: {error}. "
            'Install it: pip install "keras_ebft[plots]".'
        ) from error
    figure = Figure(figsize=(4.6 * panels, 3.6), layout="constrained")
    return figure, np.ravel(figure.subplots(1, panels))


def _finish(axis: Any, x_label: str, y_label: str, legend: bool = True) -> None:
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend()


def _not_empty(name: str, values: Any) -> Any:
    if not isinstance(values, dict) or not values:
        raise ValueError(
            f"Expected `{name}` to be a dict with at least one entry. Received: "
            f"{values!r}."
        )
    return values.items()
