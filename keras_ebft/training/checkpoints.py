"""Saving what Keras leaves out, and going on exactly where training stopped.

Keras' own saving covers weights and optimizer. Training that is killed and started
again ends with the same weights only if the random generators, the adapters apart
from their base and the place in the data come back too.
"""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from keras_ebft.validation import check_int

logger = logging.getLogger("keras_ebft")


@keras.saving.register_keras_serializable("keras_ebft")
class TrainingState(keras.layers.Layer):
    """State of training that travels with the weights.

    Every way of saving a Keras model asks each of its layers what to store; this
    one stores for the model. It must come after the layers whose variables it
    restores, because loading those layers resets them.

    Args:
        variables: function without arguments that returns a dict of Keras
            variables by name.
        metrics: function without arguments that returns the variables of the
            running means.
    """

    def __init__(
        self,
        variables: Callable[[], dict[str, keras.Variable]],
        metrics: Callable[[], list[keras.Variable]],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.variables_by_name = variables
        self.metric_variables = metrics
        self.epoch = 0
        self.batch = 0
        # Orders of the data follow from numbers of passes, over several `fit`s.
        self.first_pass = 0
        self.next_pass = 0
        self.loaded_metrics: list[np.ndarray] | None = None
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        """Writes generators, adapters, running means and the place in the data."""
        for name, variable in self.variables_by_name().items():
            store[name] = variable
        passes = [self.first_pass, self.next_pass]
        store["position"] = np.array([self.epoch, self.batch, *passes], dtype="int64")
        for index, variable in enumerate(self.metric_variables()):
            store[f"metric_{index}"] = variable

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote.

        Raises:
            ValueError: if the file is of a model with other adapters.
        """
        variables = self.variables_by_name()
        names = list(store.keys())
        stored = {
            name
            for name in names
            if name != "position" and not name.startswith("metric_")
        }
        if stored != set(variables):
            raise ValueError(
                "Expected weights of a model with the same adapters. Received: a "
                f"file with {_count_adapters(stored)} adapted layers for a model "
                f"with {_count_adapters(variables)}. Call "
                "causal_lm.backbone.enable_lora() as it was called for the saved "
                "model, before EBFTModel is built."
            )
        for name, variable in variables.items():
            variable.assign(store[name])
        # Files of before have no numbers of passes.
        self.epoch, self.batch, *passes = (int(value) for value in store["position"])
        self.first_pass, self.next_pass = passes or (0, self.epoch + 1)
        count = len(names) - len(stored) - 1
        self.loaded_metrics = [np.array(store[f"metric_{i}"]) for i in range(count)]

    def restore_metrics(self) -> None:
        """Sets the running means of the interrupted epoch."""
        for variable, value in zip(self.metric_variables(), self.loaded_metrics or ()):
            variable.assign(value)


class TrainingCheckpoint(keras.callbacks.Callback):
    """Saves training while it runs, and resumes it when `fit` is called again.

    A run that was killed at any moment, and started again by the same program,
    ends with the weights it would have had: bit for bit on the same backend and
    machine, provided the data comes in the same order. Documents in memory do,
    shuffled or not, with the model's `seed` given, and so do `PackedRows.py_dataset`
    and any source whose order follows from what its `begin_epoch(epoch)` is told;
    another stream must yield the same batches again.

    The file holds weights, optimizer, random generators, adapters and the place
    in the data. It is replaced in one move, so that one of the two is whole even
    if the machine stops while writing. It stays after training: delete it, or
    choose another path, to train anew.

    Args:
        filepath: path of the file, ending in `.weights.h5`.
        save_freq: `"epoch"`, or an int: batches between two savings.

    Raises:
        TypeError: if `save_freq` is neither.
        ValueError: if `filepath` ends otherwise or `save_freq` is below 1.

    Example:
    ```python
    checkpoint = keras_ebft.TrainingCheckpoint("run/latest.weights.h5", save_freq=50)
    model.fit(texts, epochs=3, callbacks=[checkpoint])
    ```
    """

    def __init__(
        self, filepath: str | os.PathLike[str], save_freq: int | str = "epoch"
    ) -> None:
        super().__init__()
        if not str(filepath).endswith(".weights.h5"):
            raise ValueError(
                "Expected `filepath` to end in '.weights.h5'. Received: "
                f"{str(filepath)!r}. Keras tells kinds of files by their ending."
            )
        self.filepath = Path(filepath)
        self.save_freq = save_freq
        if save_freq != "epoch":
            self.save_freq = check_int("save_freq", save_freq, 1)
        self._saved_at = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Loads the file if there is one."""
        if not self.filepath.exists():
            return
        model = self.model
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(self.filepath)
        # As Keras' own callback for this purpose says where to go on.
        model._initial_epoch = model.training_state.epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Counts from where training resumes."""
        self._saved_at = self.model.training_state.batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves if `save_freq` batches have passed."""
        frequency = self.save_freq
        if frequency != "epoch" and batch + 1 - self._saved_at >= cast(int, frequency):
            self._save()
            self._saved_at = batch + 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves."""
        self._save()

    def _save(self) -> None:
        self.filepath.parent.mkdir(parents=True, exist_ok=True)
        partial = self.filepath.with_name(f"partial-{self.filepath.name}")
        self.model.save_weights(partial, overwrite=True)
        os.replace(partial, self.filepath)


def _count_adapters(names: Iterable[str]) -> int:
    return sum(name.endswith("lora_kernel_a") for name in names)
