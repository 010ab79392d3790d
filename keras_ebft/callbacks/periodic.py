"""What callbacks share that do something every so many steps or epochs."""

from typing import Any, cast

import keras

from keras_ebft.configurable import Shown
from keras_ebft.model import EBFTModel
from keras_ebft.validation import check_choice, check_int

UNITS = ("epochs", "steps")


class Periodic(Shown, keras.callbacks.Callback):
    """Does something every so many steps or epochs; a subclass says what, in `fire`.

    Steps are batches that were trained on in the model's life, those before training
    was resumed included; batches that resumed training passes over are none. With
    `steps_per_execution` above 1 it is after the call in which the step fell.

    Args:
        every: int.
        unit: `"epochs"` or `"steps"`.

    Raises:
        TypeError: if `every` is no int.
        ValueError: if `every` is below 1 or `unit` is another word. When training
            begins, for a model other than an `EBFTModel`.
    """

    def __init__(self, every: int, unit: str) -> None:
        super().__init__()
        self.every = check_int("every", every, 1)
        self.unit = check_choice("unit", unit, UNITS)
        self.step = 0
        self.epoch = 0
        self._epoch_start = 0
        self._passed = 0
        self._began = False

    @property
    def ebft_model(self) -> EBFTModel:
        """The `EBFTModel` that is trained, with the weights of the moment."""
        return cast(EBFTModel, self.model)

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins anew."""
        self._began = False
        if not isinstance(self.model, EBFTModel):
            raise ValueError(
                f"Expected a {type(self).__name__} in the fit() of an EBFTModel. "
                f"Received: that of a {type(self.model).__name__}."
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Reads how many steps there were; calls `begin` before the first."""
        model = self.ebft_model
        self.epoch = epoch
        # Once per epoch: while it lasts, asking would wait for the device.
        self._epoch_start = model.steps_trained
        self._passed = model.train_function.batches_to_pass
        self.step = self._epoch_start
        if not self._began:
            self._began = True
            self.begin(logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Fires, if a step that it is due at has been taken."""
        before = self.step
        self.step = self._epoch_start + max(batch + 1 - self._passed, 0)
        if self.unit == "steps" and self.step // self.every > before // self.every:
            self.fire(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Fires, if this is an epoch that it is due at."""
        if self.unit == "epochs" and not (epoch + 1) % self.every:
            self.fire(logs)

    def begin(self, logs: Any) -> None:
        """Called before the first step of a `fit`."""

    def fire(self, logs: Any) -> None:
        """Called when it is due, with the logs of the batch or epoch."""
        raise NotImplementedError
