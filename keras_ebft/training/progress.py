"""A progress bar that fits a line."""

from typing import Any

import keras

from keras_ebft.training.timing import StepTimer

# Of this library's own metrics; what others log is shown.
SHOWN = ("feature_matching_loss", "reward", "ce_loss")
# Shown once they are not 0.
ALARMS = ("skipped_updates",)
PROGRESS = ("short", "full")


class ShortProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar with the few metrics that say how training goes.

    `History`, loggers and other callbacks get all of them. The loss is not among
    those shown: a policy loss has the right gradient and no meaningful value.

    Args:
        timer: `StepTimer` of the `fit`, whose tokens per second are shown, or `None`.
    """

    def __init__(self, timer: StepTimer | None = None) -> None:
        super().__init__()
        self.timer = timer

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Shows the metrics so far."""
        super().on_train_batch_end(batch, self._timed(self._short(logs)))

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Shows the metrics so far."""
        super().on_test_batch_end(batch, self._short(logs))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Ends the line."""
        super().on_epoch_end(epoch, self._timed(self._short(logs)))

    def on_test_end(self, logs: Any = None) -> None:
        """Ends the line."""
        super().on_test_end(self._short(logs))

    def _timed(self, shown: dict[str, Any]) -> dict[str, Any]:
        speed = {} if self.timer is None else self.timer.measured()
        if "tokens_per_second" in speed:
            shown["tokens_per_second"] = round(speed["tokens_per_second"])
        return shown

    def _short(self, logs: Any) -> dict[str, Any]:
        logs = logs or {}
        hidden = {metric.name for metric in self.model.metrics} - set(SHOWN)
        hidden -= {name for name in ALARMS if float(logs.get(name, 0.0))}
        return {
            name: value
            for name, value in logs.items()
            if name.removeprefix("val_") not in hidden
        }
