"""Callbacks that watch a metric: which way is better, and which say nothing."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_ebft.validation import is_zero

# Where smaller is better. Neither is, for what is not listed in either.
SMALLER = (
    "loss",
    "feature_matching_loss",
    "whitened_feature_matching_loss",
    "unbiased_feature_matching_loss",
    "ce_loss",
    "perplexity",
    "kl",
    "critic_loss",
    "zero_std_fraction",
)
GREATER = (
    "alignment",
    "matching_score",
    "reward",
    "best_alignment",
    "best_reward",
    "token_match",
    "critic_accuracy",
)


def settle_monitors(callbacks: Iterable[keras.callbacks.Callback], model: Any) -> None:
    """Tells callbacks with `mode="auto"` which way is better.

    Args:
        callbacks: what `fit` was given.
        model: `EBFTModel`.

    Raises:
        ValueError: for a callback that watches the loss of a policy gradient, whose
            value says nothing, or a metric of which neither way is better.
    """
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or not _decides(callback):
            continue
        name = monitor.removeprefix("val_")
        if name == "loss":
            _refuse_noise(callback, monitor, model)
        if getattr(callback, "mode", None) != "auto":
            continue
        if name in SMALLER or name in GREATER:
            callback.mode = "min" if name in SMALLER else "max"
        elif name in model.metrics_names:
            raise ValueError(
                f"Expected `mode` of a {type(callback).__name__} that watches "
                f"{monitor!r}, of which more is neither better nor worse. Received: "
                'mode="auto". Pass mode="min" or "max".'
            )


def _decides(callback: Any) -> bool:
    """Whether it does anything with what it watches."""
    return not isinstance(callback, keras.callbacks.ModelCheckpoint) or bool(
        callback.save_best_only
    )


def _refuse_noise(callback: Any, monitor: str, model: Any) -> None:
    if is_zero(model.objective.policy_weight):
        return
    measures = model.reward.block_measures
    better = measures[0] if measures else "reward"
    mode = "max" if better in GREATER else "min"
    raise ValueError(
        f"Expected a {type(callback).__name__} that watches what training lowers or "
        f"raises. Received: monitor={monitor!r}, noise around 0 where a policy "
        f'gradient is trained. Pass for example monitor="val_{better}", mode="{mode}".'
    )
