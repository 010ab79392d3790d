"""A progress bar that fits a line."""

from typing import Any

import keras

# Of this library's own metrics; what others log is shown.
SHOWN = ("feature_matching_loss", "reward", "ce_loss")
# Shown once they are not 0.
ALARMS = ("skipped_updates",)
PROGRESS = ("short", "full")


class ShortProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar with the few metrics that say how training goes.

    `History`, loggers and other callbacks get all of them. The loss is not among
    those shown: a policy loss has the right gradient and no meaningful value.
    """

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Shows the metrics so far."""
        super().on_train_batch_end(batch, self._short(logs))

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Shows the metrics so far."""
        super().on_test_batch_end(batch, self._short(logs))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Ends the line."""
        super().on_epoch_end(epoch, self._short(logs))

    def on_test_end(self, logs: Any = None) -> None:
        """Ends the line."""
        super().on_test_end(self._short(logs))

    def _short(self, logs: Any) -> dict[str, Any]:
        logs = logs or {}
        hidden = {metric.name for metric in self.model.metrics} - set(SHOWN)
        hidden -= {name for name in ALARMS if float(logs.get(name, 0.0))}
        return {
            name: value
            for name, value in logs.items()
            if name.removeprefix("val_") not in hidden
        }
