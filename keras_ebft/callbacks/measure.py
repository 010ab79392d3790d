"""A callback that measures the model while it trains."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_ebft.callbacks.periodic import Periodic
from keras_ebft.evaluation import paired_change
from keras_ebft.validation import check_bool


class Measure(Periodic):
    """Adds measurements to the logs, every so many epochs or steps.

    They appear in the progress bar and in `History`, and callbacks that come later
    in the list, such as `EarlyStopping`, can monitor them. Measured by steps, they
    stand in the logs of that batch, and the last of an epoch in the logs of the
    epoch; the others are in `history` alone.

    Args:
        function: function of the model that returns a dict from names to floats.
        every: int, epochs or steps from one measurement to the next; the logs in
            between have no entry.
        prefix: str, put before the names.
        unit: `"epochs"` or `"steps"`, batches that were trained on.
        paired: bool, whether the function returns float arrays `[N]`, one value for
            each of the same N documents, as `PairedFeatureMatching` does. It is then
            also called before the first step, and every name comes with two more:
            `..._change`, the mean difference from then, and `..._noise`, half of
            its 95 % interval. A change within the noise is none. NaN, the value
            of documents without one, is left out.

    Attributes:
        history: list of dicts, `step`, `epoch` and what was measured, in all calls of
            `fit`.

    Raises:
        TypeError: if `function` cannot be called or `every` is no int. While training:
            if the function returns something else.
        ValueError: if `every` is below 1 or `unit` is another word. While training: if
            a name is taken.

    Example:
    ```python
    def perplexity(model):
        return keras_ebft.evaluation.cross_entropy(model, held_out)

    changes = keras_ebft.evaluation.PairedFeatureMatching(model, held_out[:32])
    callbacks = [
        keras_ebft.callbacks.Measure(perplexity),
        keras_ebft.callbacks.Measure(changes, every=50, unit="steps", paired=True),
    ]
    model.fit(texts, callbacks=callbacks)
    ```
    """

    def __init__(
        self,
        function: Callable[[keras.Model], dict[str, Any]],
        every: int = 1,
        prefix: str = "val_",
        unit: str = "epochs",
        paired: bool = False,
    ) -> None:
        super().__init__(every, unit)
        if not callable(function):
            raise TypeError(
                "Expected `function` to be a function of the model. Received: "
                f"{function!r} (of type {type(function).__name__})."
            )
        self.function = function
        self.prefix = prefix
        self.paired = check_bool("paired", paired)
        self.history: list[dict[str, Any]] = []
        self._before: dict[str, np.ndarray] = {}
        self._of_epoch: dict[str, float] = {}

    def begin(self, logs: Any) -> None:
        """Measures where training begins, to compare with."""
        if self.paired:
            self._before = self._arrays()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Forgets what was measured in the epoch before."""
        self._of_epoch = {}
        super().on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measures, or adds the last measurement of the epoch to its logs."""
        super().on_epoch_end(epoch, logs)
        if self.unit == "steps" and self._of_epoch:
            self._add(self._of_epoch, logs)

    def fire(self, logs: Any) -> None:
        """Measures."""
        found = self._compared() if self.paired else self._floats()
        self._of_epoch = {self.prefix + name: value for name, value in found.items()}
        self._add(self._of_epoch, logs)
        self.history.append({"step": self.step, "epoch": self.epoch, **self._of_epoch})

    def _add(self, measured: dict[str, float], logs: Any) -> None:
        taken = sorted(set(measured) & set(logs))
        if taken:
            raise ValueError(
                f"Expected names that are not in the logs yet. Received: {taken}. Pass "
                "another `prefix`."
            )
        logs.update(measured)

    def _floats(self) -> dict[str, float]:
        found = {}
        for name, value in self.function(self.model).items():
            if np.size(value) != 1:
                raise TypeError(
                    f"Expected one number as {name!r}. Received: an array of shape "
                    f"{list(np.shape(value))}. Pass paired=True for one value per "
                    "document, or return their mean."
                )
            found[name] = float(value)
        return found

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {}
        for name, value in self.function(self.model).items():
            found[name] = np.asarray(value, "float64")
            if found[name].ndim != 1:
                raise TypeError(
                    f"Expected one value per document as {name!r}, for paired=True. "
                    f"Received: shape {list(found[name].shape)}. Return an array, or "
                    "leave `paired` out."
                )
        return found

    def _compared(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, after in self._arrays().items():
            before = self._before[name]
            known = np.isfinite(before) & np.isfinite(after)
            found[name] = float(after[known].mean()) if known.any() else np.nan
            change, noise = np.nan, np.inf
            if known.any():
                change, noise = paired_change(before[known], after[known])
            found |= {f"{name}_change": change, f"{name}_noise": noise}
        return found
