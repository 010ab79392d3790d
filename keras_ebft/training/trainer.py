"""`compile`, `fit` and `evaluate` for models that train on documents alone."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_ebft.backend.held_state import holding_state
from keras_ebft.backend.runtime import resolve_jit_compile
from keras_ebft.backend.updates import update_if_finite
from keras_ebft.kernels import watch_choices
from keras_ebft.training.batches import (
    TokenBatches,
    refuse_targets,
    split_rows,
    token_batches,
)
from keras_ebft.training.callbacks import CurrentWeights, DataPosition, KernelLog
from keras_ebft.training.metrics import SkippedUpdates
from keras_ebft.training.optimizers import policy_optimizer_config, with_critic
from keras_ebft.training.progress import PROGRESS, ShortProgress
from keras_ebft.training.train_function import IN_A_ROW, TrainFunction
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice, check_int

# What `fit` and `evaluate` take; within `fit`, Keras hands them on as one object.
Callbacks: TypeAlias = (
    keras.callbacks.Callback
    | Sequence[keras.callbacks.Callback]
    | keras.callbacks.CallbackList
    | None
)


class DocumentTrainer(keras.Model):
    """A Keras model whose data are documents, without targets.

    A subclass has `causal_lm`, `seed`, an `_evaluation_seed` that starts at
    `_evaluation_start`, `critic`, `_check_rows`, `_runs_python`, a `training_state`
    and the metric `_skipped_updates`.
    """

    train_function: Any
    _skipped_updates: SkippedUpdates

    def compile(
        self,
        optimizer: keras.optimizers.Optimizer | str | None = None,
        *,
        run_eagerly: bool = False,
        jit_compile: bool | str = "auto",
        steps_per_execution: int = 1,
        auto_scale_loss: bool = True,
        max_skipped_updates: int | None = 20,
        **unsupported: Any,
    ) -> None:
        """Configures training.

        Args:
            optimizer: any Keras optimizer or its name. By default the paper's:
                AdamW at 1e-6, betas 0.9 and 0.95, no decay, global clip norm 1.
            run_eagerly: bool, run step by step, for debugging.
            jit_compile: bool or `"auto"`: compiled by XLA on JAX, and on
                TensorFlow where there is an accelerator (a graph of its own on
                CPU); eager on PyTorch.
            steps_per_execution: int, steps per compiled call (not on PyTorch).
            auto_scale_loss: bool, scale the loss under `mixed_float16`.
            max_skipped_updates: int, how many updates in a row may be skipped
                because they are not finite, before training ends with a
                `FloatingPointError`; `None` for any number. Weights and optimizer
                stay as they were before each; `skipped_updates` counts them.
            **unsupported: losses and metrics of other models, refused.

        Raises:
            TypeError: if `max_skipped_updates` is not an integer.
            ValueError: for losses or metrics, which EBFT brings itself, a negative
                `max_skipped_updates`, or XLA where the reward runs Python that it
                cannot call.
        """
        given = sorted(name for name, value in unsupported.items() if value)
        if given:
            raise ValueError(
                "Expected no losses or metrics: EBFTModel computes its own from "
                f"`policy_weight` and `ce_weight`. Received: {', '.join(given)}. "
                "Leave them out of compile()."
            )
        if optimizer is None:
            optimizer = keras.optimizers.AdamW(
                1e-6, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
            )
        if max_skipped_updates is not None:
            check_int("max_skipped_updates", max_skipped_updates, 0)
        self._max_skipped_updates = max_skipped_updates
        if run_eagerly and jit_compile == "auto":
            jit_compile = False
        super().compile(
            optimizer=self._training_optimizer(keras.optimizers.get(optimizer)),
            run_eagerly=run_eagerly,
            jit_compile=resolve_jit_compile(jit_compile, self._runs_python),
            steps_per_execution=steps_per_execution,
            auto_scale_loss=auto_scale_loss,
        )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as the saved model was, with an optimizer of its own."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force: bool = False) -> None:
        """Makes the function that trains on one batch, as Keras does."""
        # TensorFlow traces twice where the first time made variables.
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        super().make_train_function(force)
        if not isinstance(self.train_function, TrainFunction):
            self.train_function = TrainFunction(self, self._max_skipped_updates)

    def _make_function(self, step_function: Any, **options: Any) -> Any:
        return holding_state(
            self,
            step_function,
            super()._make_function,
            runs_python=self._runs_python,
            **options,
        )

    def _update(self, state: list[Any], batch: Any) -> Any:
        """Keras' train step on a batch; an update that is not finite is skipped."""

        def record(updated: Tensor) -> dict[str, Any]:
            self._skipped_updates.update_state(updated)
            # A copy: on PyTorch the variable's own tensor changes in place.
            in_a_row = ops.copy(self._skipped_updates.in_a_row)
            return {**self.get_metrics_result(), IN_A_ROW: in_a_row}

        def step(*state: Any) -> Any:
            return super(DocumentTrainer, self).train_step(*state, (batch,))

        return update_if_finite(self, step, state, record)

    def forget_skipped_updates(self) -> None:
        """Counts updates in a row that are not finite anew."""
        self._skipped_updates.in_a_row.assign(0)

    def _training_optimizer(
        self, optimizer: keras.optimizers.Optimizer
    ) -> keras.optimizers.Optimizer:
        if self.critic is None:
            return optimizer
        own = list(self.critic_head.trainable_variables)
        if self.critic.train_features:
            own += self.frozen_network.trainable_variables
        return with_critic(optimizer, self.critic.optimizer, own)

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was called with, for saving."""
        config = super().get_compile_config()
        if config:
            config["max_skipped_updates"] = self._max_skipped_updates
        if config and self.critic is not None:
            config["optimizer"] = policy_optimizer_config(self.optimizer)
        return config

    def fit(
        self,
        x: Any = None,
        y: None = None,
        batch_size: int | None = None,
        *,
        callbacks: Callbacks = None,
        validation_data: Any = None,
        validation_split: float = 0.0,
        validation_batch_size: int | None = None,
        shuffle: bool = True,
        progress: str = "short",
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Fine-tunes on documents.

        Args:
            x: list of strings; integer array `[N, T]`; dict with `token_ids` and
                optionally `padding_mask`, `segment_ids`, `answer_mask`, `anchors`;
                or a `tf.data.Dataset`, `PyDataset`, torch `DataLoader` or
                generator that yields batches of these. A `begin_epoch(epoch)` of
                its own is called before every epoch.
            y: must be `None`; documents are their own targets.
            batch_size: int, documents per step for data in memory (default 16).
            callbacks: `keras.callbacks.Callback`, a list of them, or `None`.
            validation_data: documents of any accepted form, or `None`.
            validation_split: float in [0, 1), share of in-memory documents, taken
                from the end, to validate on.
            validation_batch_size: int, by default `batch_size`.
            shuffle: bool, reorder in-memory documents every epoch.
            progress: `"short"` or `"full"`, which metrics the progress bar shows;
                `History` and callbacks get all of them.
            **kwargs: further arguments of `keras.Model.fit`, such as `verbose`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            TypeError: for token ids that are not integers.
            ValueError: for documents too short to hold a block, and whatever
                else is wrong with them; the message says what to do.
            FloatingPointError: after too many updates in a row that are not finite.
        """
        refuse_targets(y=y, **kwargs)
        bar = _progress_bar(progress, callbacks, kwargs)
        _refuse_orbax(_as_list(callbacks))
        if validation_split and validation_data is None:
            x, validation_data = split_rows(x, self.causal_lm, validation_split)
        if validation_data is not None:
            validation_data = self._batches(
                validation_data, validation_batch_size or batch_size
            )
        train = self._batches(x, batch_size, shuffle)
        # Keras would keep the epoch that an earlier `fit` resumed at.
        self._initial_epoch = None
        position = DataPosition(
            self.training_state, train, kwargs.get("steps_per_epoch")
        )
        with watch_choices() as choices:
            own = [position, KernelLog(choices), CurrentWeights()]
            return super().fit(
                train,
                validation_data=validation_data,
                callbacks=[*own, *_as_list(callbacks), *bar],
                **kwargs,
            )

    def evaluate(
        self,
        x: Any = None,
        y: None = None,
        batch_size: int | None = None,
        *,
        callbacks: Callbacks = None,
        progress: str = "short",
        **kwargs: Any,
    ) -> Any:
        """Measures on documents, always with the same random numbers.

        Args:
            x: documents of any form `fit` accepts.
            y: must be `None`.
            batch_size: int, documents per step for data in memory (default 16).
            callbacks: `keras.callbacks.Callback`, a list of them, or `None`.
            progress: `"short"` or `"full"`, which metrics the progress bar shows.
            **kwargs: further arguments of `keras.Model.evaluate`.

        Returns:
            list of metric values, or a dict with `return_dict=True`.

        Raises:
            TypeError: for token ids that are not integers.
            ValueError: for anything else wrong with the documents.
        """
        refuse_targets(y=y, **kwargs)
        # Within `fit`, its callbacks come as one object.
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            bar = _progress_bar(progress, callbacks, kwargs)
            callbacks = [CurrentWeights(), *_as_list(callbacks), *bar]
        self._evaluation_seed.state.assign(self._evaluation_start.copy())
        return super().evaluate(
            self._batches(x, batch_size), callbacks=callbacks, **kwargs
        )

    def _batches(
        self, x: Any, batch_size: int | None, shuffle: bool = False
    ) -> TokenBatches:
        return token_batches(
            x,
            self.causal_lm,
            check_rows=self._check_rows,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
        )


def _progress_bar(
    progress: str, callbacks: Callbacks, options: dict[str, Any]
) -> list[keras.callbacks.Callback]:
    """Ours, unless there is to be none, Keras' own, or one that was given."""
    progress = check_choice("progress", progress, PROGRESS)
    bars = keras.callbacks.ProgbarLogger
    given = any(isinstance(callback, bars) for callback in _as_list(callbacks))
    if progress == "full" or options.get("verbose") == 0 or given:
        return []
    return [ShortProgress()]


def _refuse_orbax(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    orbax = keras.callbacks.OrbaxCheckpoint
    if any(isinstance(callback, orbax) for callback in callbacks):
        raise ValueError(
            "Expected a callback that asks the model what to save. Received: an "
            "OrbaxCheckpoint, which keeps variables alone, without the place in the "
            "data. Use keras_ebft.TrainingCheckpoint to resume, or "
            "keras.callbacks.ModelCheckpoint to keep models."
        )


def _as_list(callbacks: Callbacks) -> list[keras.callbacks.Callback]:
    if isinstance(callbacks, (list, tuple)):
        return list(callbacks)
    return [] if callbacks is None else [callbacks]
