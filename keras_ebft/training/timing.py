"""How long steps take, and how many tokens they read in that time."""

import time
from typing import Any

import keras

from keras_ebft.training.batches import TokenBatches


class StepTimer(keras.callbacks.Callback):
    """Times the steps of an epoch; `fit` puts it before all callbacks of the user.

    A step has ended when its `skipped_updates` are known, which `fit` looks at after
    every step: nothing more has to wait for the device.

    Args:
        batches: `TokenBatches` that `fit` reads.
    """

    def __init__(self, batches: TokenBatches) -> None:
        super().__init__()
        self.batches = batches
        self._first: float | None = None
        self._seconds, self._steps = 0.0, 0
        self._done, self._passing = 0, 0
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins anew."""
        self._seconds, self._steps, self._done = 0.0, 0, 0
        self._passing = self.model.train_function.batches_to_pass

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Notes the time."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the steps since, one or those of one call."""
        seconds = time.perf_counter() - self._began
        steps, self._done = batch + 1 - self._done, batch + 1
        if batch < self._passing:
            # Trained on before training was interrupted.
            return
        if self._first is None:
            self._first = seconds / steps
            return
        self._seconds += seconds
        self._steps += steps

    def measured(self) -> dict[str, float]:
        """`step_time` in seconds and `tokens_per_second`; empty before the first step.

        The first step of a `fit` counts where it is the only one.
        """
        step_time = self._seconds / self._steps if self._steps else self._first
        if not step_time:
            return {}
        tokens = self.batches.tokens_read / max(self.batches.batches_read, 1)
        return {"step_time": step_time, "tokens_per_second": tokens / step_time}
