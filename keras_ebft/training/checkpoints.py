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
import keras_hub
import numpy as np

from keras_ebft.backend.replicas import is_first
from keras_ebft.backend.runtime import backend_name
from keras_ebft.configurable import Shown
from keras_ebft.networks import adapters
from keras_ebft.training import checkpoint_files
from keras_ebft.training.frozen_weights import frozen_weights
from keras_ebft.training.optimizers import policy_optimizer
from keras_ebft.training.part_settings import optimizer_settings, part_settings
from keras_ebft.validation import check_bool, check_int
from keras_ebft.version import __version__

logger = logging.getLogger("keras_ebft")

# Files of before do not say it.
ALPHA = "alpha"


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
        alphas: function without arguments that returns the alpha of every adapted
            layer, a list of floats.
    """

    def __init__(
        self,
        variables: Callable[[], dict[str, keras.Variable]],
        metrics: Callable[[], list[keras.Variable]],
        alphas: Callable[[], list[float]],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.variables_by_name = variables
        self.metric_variables = metrics
        self.alphas = alphas
        self.epoch = 0
        self.batch = 0
        # What tells the data of a `fit` from others, a dict that JSON can hold.
        self.data: dict[str, Any] = {}
        # Orders of the data follow from numbers of passes, over several `fit`s.
        self.first_pass = 0
        self.next_pass = 0
        self.loaded_metrics: list[np.ndarray] | None = None
        self._refusal: ValueError | None = None
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        """Writes generators, adapters, running means and the place in the data."""
        for name, variable in self.variables_by_name().items():
            store[name] = variable
        if self.alphas():
            store[ALPHA] = np.array(self.alphas(), dtype="float64")
        passes = [self.first_pass, self.next_pass]
        store["position"] = np.array([self.epoch, self.batch, *passes], dtype="int64")
        for index, variable in enumerate(self.metric_variables()):
            store[f"metric_{index}"] = variable

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote.

        Raises:
            ValueError: if the file is of a model with other adapters, or with
                adapters of another alpha.
        """
        names = set(store.keys())
        if not names and self._refusal is not None:
            # Keras asks again by another name of the layer, and shows the last error.
            raise self._refusal
        self._refusal = None
        try:
            self._load(store, names)
        except ValueError as error:
            self._refusal = error
            raise

    def _load(self, store: Any, names: set[str]) -> None:
        variables = self.variables_by_name()
        means = {name for name in names if name.startswith("metric_")}
        stored = names - means - {"position", ALPHA}
        if stored != set(variables):
            raise ValueError(
                "Expected weights of a model with the same adapters. Received: a "
                f"file with {_count_adapters(stored)} adapted layers for a model "
                f"with {_count_adapters(variables)}. Call "
                "causal_lm.backbone.enable_lora() as it was called for the saved "
                "model, before EBFTModel is built."
            )
        if ALPHA in names:
            _check_alphas(np.array(store[ALPHA]).tolist(), self.alphas())
        for name, variable in variables.items():
            variable.assign(store[name])
        # Files of before have no numbers of passes.
        self.epoch, self.batch, *passes = (int(value) for value in store["position"])
        self.first_pass, self.next_pass = passes or (0, self.epoch + 1)
        count = range(len(means))
        self.loaded_metrics = [np.array(store[f"metric_{i}"]) for i in count]

    def restore_metrics(self) -> None:
        """Sets the running means of the interrupted epoch."""
        for variable, value in zip(self.metric_variables(), self.loaded_metrics or ()):
            variable.assign(value)


class TrainingCheckpoint(Shown, keras.callbacks.Callback):
    """Saves training while it runs, and resumes it when `fit` is called again.

    A run that was killed at any moment, and started again by the same program,
    ends with the weights it would have had: bit for bit on the same backend and
    machine, provided the data comes in the same order. Documents in memory do,
    shuffled or not, with the model's `seed` given, and so do `PackedRows.py_dataset`
    and any source whose order follows from what its `begin_epoch(epoch)` is told;
    another stream must yield the same batches again.

    The file holds weights, optimizer, random generators, adapters and the place
    in the data, a checksum of them, and a record of the run: the optimizer and its
    settings, those of sampler, features, reward and loss, the shapes of weights and
    batches, which data they come from and in which order, and the versions. A file
    that is damaged or of another run is refused by name, before a weight changes;
    other versions alone are logged. The learning rate, where it is a number, is the
    file's.

    A file is written beside, flushed to disk, and moved to its place, so that there
    is a whole one even if the machine stops while writing; the one before is kept as
    `previous-...` beside it. Weights that are not finite are not written. The file
    stays after training, and the next `fit` of as many epochs has nothing left to do
    and says so: delete it, or choose another path, to train anew. Every run needs a
    path of its own.

    Args:
        filepath: path of the file, ending in `.weights.h5`.
        save_freq: `"epoch"`, or an int: batches between two savings.
        strict: bool, whether a file of another run is refused; else the differences
            are logged, and training goes on at the file's place.

    Raises:
        TypeError: if `save_freq` is neither, or `strict` is not a boolean.
        ValueError: if `filepath` ends otherwise or `save_freq` is below 1. From
            `fit`: if the file is damaged or of another run, or another run writes
            to the same path.
        FloatingPointError: from `fit`, before weights that are not finite are
            written.
        OSError: from `fit`, if the file cannot be written.

    Example:
    ```python
    checkpoint = keras_ebft.TrainingCheckpoint("run/latest.weights.h5", save_freq=50)
    model.fit(texts, epochs=3, callbacks=[checkpoint])
    ```
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        save_freq: int | str = "epoch",
        strict: bool = True,
    ) -> None:
        super().__init__()
        if not str(filepath).endswith(".weights.h5"):
            raise ValueError(
                "Expected `filepath` to end in '.weights.h5'. Received: "
                f"{str(filepath)!r}. Keras tells kinds of files by their ending."
            )
        self.filepath = Path(filepath)
        self.save_freq = save_freq
        if not (isinstance(save_freq, str) and save_freq == "epoch"):
            self.save_freq = check_int("save_freq", save_freq, 1)
        self.strict = check_bool("strict", strict)
        self._saved_at = 0
        self._run: dict[str, Any] = {}
        self._stamp: tuple[int, ...] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Loads the file if there is one."""
        model = self.model
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._run = run_record(model)
        self._stamp = checkpoint_files.stamp(self.filepath)
        checkpoint_files.remove_stale(self.filepath)
        if self._stamp is None:
            return
        written = checkpoint_files.read_record(self.filepath)
        if written is not None:
            self._check_run(written)
        asked = _learning_rate(model)
        model.load_weights(self.filepath)
        if _learning_rate(model) != asked:
            logger.warning(
                "Training resumes with the learning rate of %s, %.6g in place of %.6g. "
                "Assign model.optimizer.learning_rate in a callback's on_train_begin, "
                "after this one, to go on with another.",
                *(self.filepath, _learning_rate(model), asked),
            )
        # As Keras' own callback for this purpose says where to go on.
        model._initial_epoch = model.training_state.epoch
        if model.training_state.epoch >= (self.params or {}).get("epochs", 1):
            logger.warning(
                "The training of %s is finished after %d epochs: nothing is left to "
                "train. Pass more `epochs` to go on, delete the file or choose another "
                "path to train anew.",
                self.filepath,
                model.training_state.epoch,
            )

    def _check_run(self, written: dict[str, Any]) -> None:
        versions = {"versions": self._run["versions"]}
        found = list(
            checkpoint_files.differences({"versions": written["versions"]}, versions)
        )
        if found:
            logger.warning(
                "Training resumes under other versions, perhaps not bit for bit: %s.",
                "; ".join(found),
            )
        found = list(
            checkpoint_files.differences(
                {**written, "versions": None},
                # Files of earlier versions do not have all of it.
                {
                    **{k: v for k, v in self._run.items() if k in written},
                    "versions": None,
                },
            )
        )
        if not found:
            return
        if not self.strict:
            logger.warning("Training resumes as another run: %s.", "; ".join(found))
            return
        raise ValueError(
            f"Expected the run that {self.filepath} is of, to resume it. Received "
            f"another: {'; '.join(found)}. Start it as it was; delete the file or "
            "choose another path to train anew; or resume all the same with "
            "TrainingCheckpoint(..., strict=False)."
        )

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
        if not is_first():
            # On JAX all processes take part in reading weights.
            self.model.save_weights(self.filepath)
            return
        found = checkpoint_files.stamp(self.filepath)
        if found is not None and found != self._stamp:
            raise ValueError(
                f"Expected {self.filepath} to be written by this run alone. Received: "
                "a file that something else wrote since. Give every run a path of its "
                "own."
            )
        checkpoint_files.write_checkpoint(self.model, self.filepath, self._run)
        self._stamp = checkpoint_files.stamp(self.filepath)


def run_record(model: Any) -> dict[str, Any]:
    """What a run is: all that must be the same for training to resume.

    Args:
        model: compiled `EBFTModel` within `fit`.

    Returns:
        nested dict that JSON can hold.
    """
    return {
        "versions": {
            "keras_ebft": __version__,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
            "backend": backend_name(),
        },
        "weights": {
            f"{index} {variable.name}": [*variable.shape, variable.dtype]
            for index, variable in enumerate(model.weights)
        },
        "adapters": [
            [layer.lora_rank, layer.lora_alpha]
            for layer in adapters.adapted_layers(model.causal_lm.backbone)
        ],
        "optimizer": optimizer_settings(model.get_compile_config()["optimizer"]),
        "weight_decay": _decayed(model),
        "settings": part_settings(model),
        "data": model.training_state.data,
        "frozen": frozen_weights(model.causal_lm),
    }


def _learning_rate(model: Any) -> float | None:
    """The number that training may change; `None` of a schedule."""
    rate = policy_optimizer(model.optimizer)._learning_rate
    return float(rate) if isinstance(rate, keras.Variable) else None


def _decayed(model: Any) -> list[int] | None:
    """Which weights decay, by their places; `None` where none does.

    An optimizer's configuration does not say which `exclude_from_weight_decay` named.
    """
    optimizer = policy_optimizer(model.optimizer)
    if not optimizer.weight_decay:
        return None
    weights = enumerate(model.causal_lm.trainable_variables)
    return [place for place, one in weights if optimizer._use_weight_decay(one)]


def _check_alphas(written: list[float], now: list[float]) -> None:
    if written != [float(alpha) for alpha in now]:
        raise ValueError(
            "Expected weights of a model whose adapters have the same alpha. Received: "
            f"a file of alpha {_distinct(written)} for a model of {_distinct(now)}, "
            "which would say other things with the same weights. Call "
            "causal_lm.backbone.enable_lora() as it was called for the saved model, "
            "before EBFTModel is built, or set lora_alpha of the adapted layers."
        )


def _distinct(alphas: list[float]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas)))


def _count_adapters(names: Iterable[str]) -> int:
    return sum(name.endswith("lora_kernel_a") for name in names)
