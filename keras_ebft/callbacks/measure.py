"""A callback that measures the model while it trains."""

from collections.abc import Callable
from typing import Any

import keras

from keras_ebft.representation import Shown
from keras_ebft.validation import check_int


class Measure(Shown, keras.callbacks.Callback):
    """Adds measurements to the logs at the end of epochs.

    They appear in the progress bar and in `History`, and callbacks that come later
    in the list, such as `EarlyStopping`, can monitor them.

    Args:
        function: function of the model that returns a dict from names to floats.
        every: int, epochs from one measurement to the next; the logs in between
            have no entry.
        prefix: str, put before the names.

    Raises:
        TypeError: if `function` cannot be called or `every` is no int.
        ValueError: if `every` is below 1. While training: if a name is taken.

    Example:
    ```python
    def perplexity(model):
        return keras_ebft.evaluation.cross_entropy(model, held_out)

    model.fit(texts, callbacks=[keras_ebft.callbacks.Measure(perplexity)])
    ```
    """

    def __init__(
        self,
        function: Callable[[keras.Model], dict[str, Any]],
        every: int = 1,
        prefix: str = "val_",
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(
                "Expected `function` to be a function of the model. Received: "
                f"{function!r} (of type {type(function).__name__})."
            )
        self.function = function
        self.every = check_int("every", every, 1)
        self.prefix = prefix

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measures, every so often."""
        if (epoch + 1) % self.every:
            return
        measured = {
            self.prefix + name: float(value)
            for name, value in self.function(self.model).items()
        }
        taken = sorted(set(measured) & set(logs))
        if taken:
            raise ValueError(
                f"Expected names that are not in the logs yet. Received: {taken}. Pass "
                "another `prefix`."
            )
        logs.update(measured)
