"""`fit` in several processes: one writes, and the others follow it."""

import logging
from typing import Any

import keras

from keras_ebft.backend.replicas import (
    follow_first,
    from_first,
    is_first,
    num_processes,
    wait_for_all,
)

# What does nothing but write.
WRITERS = (
    keras.callbacks.CSVLogger,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def without_writers(
    callbacks: list[keras.callbacks.Callback],
) -> list[keras.callbacks.Callback]:
    """The callbacks that this process runs.

    Args:
        callbacks: list of callbacks. One of the user's own that writes says so by an
            attribute `writes`.

    Returns:
        All of them in the first process; in others those that decide something, which
        all processes must decide alike.

    Raises:
        ValueError: for Keras' `BackupAndRestore` in several processes.
    """
    backup = keras.callbacks.BackupAndRestore
    if num_processes() > 1 and any(isinstance(c, backup) for c in callbacks):
        raise ValueError(
            "Expected a callback that several processes can resume with. Received: a "
            "BackupAndRestore, whose files each of them would write and remove. Use "
            "keras_ebft.TrainingCheckpoint."
        )
    if is_first():
        return callbacks
    return [
        callback
        for callback in callbacks
        if not (isinstance(callback, WRITERS) or getattr(callback, "writes", False))
    ]


class _OfFirst(logging.Filter):
    """Lets through what the first process logs, and errors of all."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_first()


logging.getLogger("keras_ebft").addFilter(_OfFirst())


class FollowFirst(keras.callbacks.Callback):
    """Begins training in every process where the first begins it.

    `EBFTModel.fit` puts it behind all callbacks, those that read files: only the
    first process may see them.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        """Takes weights, optimizer, generators and the place in the data."""
        model = self.model
        state = model.training_state
        metrics = state.loaded_metrics
        place = from_first(
            {
                "epoch": state.epoch,
                "batch": state.batch,
                "first_pass": state.first_pass,
                "next_pass": state.next_pass,
                # Keras' own kind of list cannot be sent.
                "loaded_metrics": None if metrics is None else list(metrics),
            }
        )
        for name, value in place.items():
            setattr(state, name, value)
        model._initial_epoch = from_first(model._initial_epoch)
        follow_first([*model.variables, *model.optimizer.variables])

    def on_train_end(self, logs: Any = None) -> None:
        """Waits until all that the first process writes is written."""
        wait_for_all()
