"""The callbacks that `fit` brings itself, before those of the user."""

import logging
import math
from typing import Any

import keras
from keras import ops

from keras_ebft.training.batches import TokenBatches
from keras_ebft.training.checkpoints import TrainingState

logger = logging.getLogger("keras_ebft")


class DataPosition(keras.callbacks.Callback):
    """Keeps the place in the data, and goes back to it when weights are restored.

    `EBFTModel.fit` puts it before all other callbacks. A callback that loads
    weights when training begins, such as `keras.callbacks.BackupAndRestore`, then
    resumes at the very batch.

    Args:
        state: `TrainingState`.
        batches: `TokenBatches` that `fit` reads.
        steps_per_epoch: int or `None`, as given to `fit`; where a call of the train
            function has several steps, an epoch is of whole calls.
        initial_epoch: int, as given to `fit`. Where it is 0 the data goes on with an
            order that it has not had, otherwise with that of the epoch's number.
    """

    def __init__(
        self,
        state: TrainingState,
        batches: TokenBatches,
        steps_per_epoch: int | None,
        initial_epoch: int = 0,
    ) -> None:
        super().__init__()
        self.initial_epoch = initial_epoch
        self._began = False
        self.state = state
        self.batches = batches
        self.steps_per_epoch = steps_per_epoch

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets weights that were loaded before."""
        if self.steps_per_epoch:
            # Keras makes whole calls.
            calls = math.ceil(self.steps_per_epoch / self.model.steps_per_execution)
            self.steps_per_epoch = calls * self.model.steps_per_execution
        self.state.loaded_metrics = None
        self.state.data = {
            **self.batches.record(),
            "steps_per_epoch": self.steps_per_epoch,
        }
        self.model.train_function.batches_to_pass = 0
        if not self.initial_epoch:
            self.state.first_pass = self.state.next_pass

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Tells the data which epoch begins, and passes over what was seen."""
        self._number_passes(epoch)
        restored = self.state.loaded_metrics is not None
        if restored and self.state.epoch == epoch:
            self._resume(epoch, self.state.batch)
        else:
            self.state.epoch, self.state.batch = epoch, 0
        self.state.loaded_metrics = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the batch as seen, unless it was before the interruption."""
        self.state.batch = max(self.state.batch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Counts the epoch as seen."""
        self.state.epoch, self.state.batch = epoch + 1, 0

    def _number_passes(self, epoch: int) -> None:
        """Decides the orders, so that no two passes over the data have the same."""
        state, steps, whole = self.state, self.steps_per_epoch, None
        if steps:
            whole = self.batches.batches_per_pass
        passes = -(-(epoch + 1) * steps // whole) if steps and whole else epoch + 1
        state.next_pass = state.first_pass + passes
        if not steps:
            self.batches.begin_epoch(state.first_pass + epoch)
        elif not self._began:
            self._began = True
            self.batches.begin_epoch(state.first_pass)

    def _resume(self, epoch: int, batch: int) -> None:
        if batch % self.model.steps_per_execution:
            raise ValueError(
                "Expected a file that was written after whole calls of "
                f"{self.model.steps_per_execution} steps (`steps_per_execution`). "
                f"Received: one of after batch {batch} of an epoch. Compile with the "
                "number of steps that the interrupted training had."
            )
        if self.steps_per_epoch:
            self.batches.skip(epoch * self.steps_per_epoch)
        if batch:
            self.state.restore_metrics()
            forward = self.model.train_function
            forward.logs = self.model.get_metrics_result()
            forward.batches_to_pass = batch
        logger.info("Training resumes in epoch %d after batch %d.", epoch + 1, batch)


class AveragedWeights(keras.callbacks.Callback):
    """Puts averaged weights (`use_ema`) in their places where training has ended.

    Keras does that itself, on JAX also where training has failed: the model would not
    hold what the last step left. `EBFTModel.fit` keeps Keras from it, and puts this
    before all other callbacks, which find what Keras would have left them.

    Args:
        optimizer: the `keras.optimizers.Optimizer` of the model.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._finalize = optimizer.finalize_variable_values

    def on_train_end(self, logs: Any = None) -> None:
        """Puts them there, unless there were no epochs."""
        if (self.params or {}).get("epochs", 1) <= 0:
            return
        self._finalize(self.model.trainable_weights)
        # JAX's steps take over the memory of weights, and the averages would lose it.
        averages = {id(variable.value) for variable in self._optimizer.variables}
        for weight in self.model.trainable_weights:
            if id(weight.value) in averages:
                weight.assign(ops.copy(weight))


class CurrentWeights(keras.callbacks.Callback):
    """Hands the state of training back to the model after every batch.

    On JAX, Keras keeps it apart while an epoch runs, and takes the variables' values
    from them. Callbacks that reach the model by `self.model` are spared that; those
    that hold on to the language model itself, to generate text, would find an error,
    or values that are newly initialised. It must come before them.
    """

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Hands back the state of a training step."""
        self._hand_back()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Hands back the state of an evaluation step."""
        self._hand_back()

    def _hand_back(self) -> keras.Model:
        # Keras does it whenever this property is read.
        return self.model


class KernelLog(keras.callbacks.Callback):
    """Logs the chosen implementations at level INFO, once per `fit`.

    They are known once the first batch has been trained on. A train function that
    was compiled by an earlier `fit` chooses no more: what it chose is kept with it.

    Args:
        choices: dict that `watch_choices` fills.
    """

    def __init__(self, choices: dict[str, set[str]]) -> None:
        super().__init__()
        self.choices = choices
        self.logged = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Logs, if this is the first batch that was trained on."""
        if self.logged:
            return
        known = self.model.train_function.kernel_choices
        # Validation is not watched: this comes before it.
        known.update(self.choices)
        if known:
            chosen = (f"{op}={'+'.join(sorted(known[op]))}" for op in sorted(known))
            logger.info("Kernels of this training: %s.", ", ".join(chosen))
            self.logged = True
