"""A callback that logs how fast training is."""

from typing import Any

import keras

from keras_ebft.configurable import Shown
from keras_ebft.training.timing import StepTimer


class Throughput(Shown, keras.callbacks.Callback):
    """Adds `step_time` and `tokens_per_second` to the logs of epochs.

    `step_time` is in seconds per step, on average over the epoch, without validation,
    other callbacks and, where there are others, the first step of a `fit`, which
    compiles. Tokens are those of the documents, padding left out. `fit` has measured
    both for its progress bar; nothing waits for the device. Put it before loggers.

    Raises:
        ValueError: when training begins, outside of `EBFTModel.fit`.

    Example:
    ```python
    model.fit(texts, callbacks=[keras_ebft.callbacks.Throughput()])
    ```
    """

    timer: StepTimer | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Finds the clock of this `fit`."""
        self.timer = getattr(self.model, "step_timer", None)
        if self.timer is None:
            raise ValueError(
                "Expected a Throughput among the callbacks of EBFTModel.fit. Received: "
                f"one of a {type(self.model).__name__}."
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds what was measured."""
        if self.timer is not None:
            logs.update(self.timer.measured())
