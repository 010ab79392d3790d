"""`compile`, `fit` and `evaluate` for models that train on documents alone."""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

# What Keras' own `compile` uses to set a metric that is listed elsewhere.
from keras.src.utils.tracking import DotNotTrackScope

from keras_ebft.backend.distribution import (
    refuse_mirrored,
    refuse_silent_distribution,
)
from keras_ebft.backend.held_state import holding_state
from keras_ebft.backend.large_updates import replaced
from keras_ebft.backend.replicas import is_first, num_processes
from keras_ebft.backend.runtime import resolve_jit_compile
from keras_ebft.backend.updates import update_if_finite, whole_step
from keras_ebft.data.row_batches import Rows
from keras_ebft.kernels import watch_choices
from keras_ebft.networks import adapters
from keras_ebft.objectives.objective import TERMS
from keras_ebft.training.batches import (
    Reader,
    TokenBatches,
    refuse_targets,
    share_of,
)
from keras_ebft.training.callbacks import (
    AveragedWeights,
    CurrentWeights,
    DataPosition,
    KernelLog,
)
from keras_ebft.training.data_report import DataLog, DataReport
from keras_ebft.training.fit_data import (
    batches_itself,
    refuse_used_up,
    split_rows,
    token_batches,
)
from keras_ebft.training.metrics import GradientNorm, LossMean, SkippedUpdates
from keras_ebft.training.monitors import settle_monitors
from keras_ebft.training.optimizers import policy_optimizer_config, with_critic
from keras_ebft.training.processes import FollowFirst, without_writers
from keras_ebft.training.progress import PROGRESS, ShortProgress
from keras_ebft.training.small_steps import warn_of_a_coarse_copy, warn_of_small_steps
from keras_ebft.training.timing import StepTimer
from keras_ebft.training.train_function import IN_A_ROW, TrainFunction
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice, check_int

# Arguments of `compile` that a model with a loss of its own has no use for.
OF_OTHER_MODELS = ("loss", "loss_weights", "metrics", "weighted_metrics")

# Terms of the loss that no weight belongs to.
OTHER_TERMS = ("critic_loss", "regularization")

# What `fit` and `evaluate` take; within `fit`, Keras hands them on as one object.
Callbacks: TypeAlias = (
    keras.callbacks.Callback
    | Sequence[keras.callbacks.Callback]
    | keras.callbacks.CallbackList
    | None
)


class DocumentTrainer(keras.Model):
    """A Keras model whose data are documents, without targets.

    A subclass has `causal_lm`, `seed`, a `_training_seed` and `_training_steps`, an
    `_evaluation_seed` that starts at `_evaluation_start`, `critic`, `_check_rows`,
    `_live_blocks`, `_runs_python` and a `training_state` and the metrics
    `_skipped_updates` and `_gradient_norm`.
    """

    train_function: Any
    _skipped_updates: SkippedUpdates
    _gradient_norm: GradientNorm
    # Of the last `fit`.
    data_report: DataReport | None = None
    # While `fit` runs.
    step_timer: StepTimer | None = None

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
                CPU); on PyTorch steps run op by op, and True is refused.
            steps_per_execution: int, steps per compiled call (not on PyTorch).
            auto_scale_loss: bool, scale the loss under `mixed_float16`.
            max_skipped_updates: int, how many updates in a row may be skipped
                because they are not finite, before training ends with a
                `FloatingPointError`; `None` for any number. Weights and optimizer
                stay as they were before each; `skipped_updates` counts them.
            **unsupported: losses and metrics of other models, refused.

        Raises:
            TypeError: if `max_skipped_updates` is not an integer, and for arguments
                that nobody knows.
            ValueError: for losses or metrics, which EBFT brings itself, a negative
                `max_skipped_updates`, XLA where the reward runs Python that it
                cannot call, or compilation on PyTorch.
        """
        unknown = sorted(set(unsupported) - set(OF_OTHER_MODELS))
        if unknown:
            raise TypeError(
                "Expected arguments of EBFTModel.compile(): see its documentation. "
                f"Received: {', '.join(unknown)}. Check the spelling."
            )
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
        updating = keras.optimizers.get(optimizer)
        refuse_mirrored(updating.variables, "an optimizer")
        super().compile(
            optimizer=self._training_optimizer(updating),
            run_eagerly=run_eagerly,
            jit_compile=resolve_jit_compile(
                jit_compile, self._runs_python, num_processes()
            ),
            steps_per_execution=steps_per_execution,
            auto_scale_loss=auto_scale_loss,
        )
        with DotNotTrackScope():
            # Where Keras keeps its own, which `metrics` lists.
            self._loss_tracker = LossMean((*TERMS.values(), *OTHER_TERMS))

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

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Makes the variables that are still missing, as Keras does.

        That can only be the optimizer's. Keras would trace the whole model in every
        `fit` and `evaluate`, because a tokenizer is a layer that is never built.
        """
        # Keras asks in `fit` alone.
        self._assert_compile_called()
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        self._post_build()

    def _make_function(self, step_function: Any, **options: Any) -> Any:
        return holding_state(
            self,
            step_function,
            super()._make_function,
            runs_python=self._runs_python,
            moved=self._moved_variables,
            **options,
        )

    @property
    def _moved_variables(self) -> list[keras.Variable]:
        """What a train step moves beside weights, optimizer and means."""
        skipped = self._skipped_updates.variables
        return [self._training_seed.state, self._training_steps, *skipped]

    def _whole_step(self, state: list[Any]) -> contextlib.AbstractContextManager[None]:
        """Context of a train step that happens whole or not at all."""
        if state:
            return contextlib.nullcontext()
        return whole_step(self.optimizer, self._moved_variables, self._runs_python)

    def _update(self, state: list[Any], batch: Any) -> Any:
        """Keras' train step on a batch; an update that is not finite is skipped."""

        def record(updated: Tensor, gradient_norm: Tensor) -> dict[str, Any]:
            self._skipped_updates.update_state(updated)
            self._gradient_norm.count_update(updated, gradient_norm)
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
            x: list or column of strings or pairs `(prompt, answer)`; integer array
                `[N, T]`; dict with `token_ids` and optionally `padding_mask`,
                `segment_ids`, `answer_mask`, `anchors`; `PackedRows`; `PackedStream`;
                or a `tf.data.Dataset`, `PyDataset`, torch `DataLoader` or
                generator that yields batches of these. A `begin_epoch(number)` of
                its own is called before every pass over the data, which is an
                epoch unless `steps_per_epoch` says otherwise.
            y: must be `None`; documents are their own targets.
            batch_size: int, documents per step for data in memory (default 16).
            callbacks: `keras.callbacks.Callback`, a list of them, or `None`.
            validation_data: documents of any accepted form, or `None`.
            validation_split: float in [0, 1), share of in-memory documents, taken
                from the end, to validate on.
            validation_batch_size: int, by default `batch_size`.
            shuffle: bool, reorder in-memory documents every pass; the seed and how
                many passes there were, in all calls of `fit`, decide the order.
            progress: `"short"` or `"full"`, which metrics the progress bar shows;
                `History` and callbacks get all of them.
            **kwargs: further arguments of `keras.Model.fit`, such as `verbose`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            TypeError: for token ids that are not integers.
            ValueError: for documents too short to hold a block, and whatever
                else is wrong with them; for a callback that watches a loss which
                is noise. The message says what to do.
            FloatingPointError: after too many updates in a row that are not finite.
        """
        refuse_targets(y=y, **kwargs)
        check_choice("progress", progress, PROGRESS)
        _refuse_orbax(_as_list(callbacks))
        settle_monitors(_as_list(callbacks), self)
        self.data_report = report = DataReport()
        if validation_split and validation_data is None:
            x, validation_data = split_rows(x, self._reader, validation_split, report)
        if validation_data is not None:
            validation_data = _without_targets(validation_data)
            size = validation_batch_size
            if size is None and not batches_itself(validation_data):
                size = batch_size
            validation_data = self._batches(validation_data, size)
        steps = kwargs.get("steps_per_epoch")
        train = self._batches(x, batch_size, shuffle, report, endless=bool(steps))
        refuse_used_up(train, validation_data, kwargs)
        self._assert_compile_called("fit")
        _refuse_nothing_to_train(self)
        warn_of_small_steps(self)
        warn_of_a_coarse_copy(self)
        # Keras would keep the epoch that an earlier `fit` resumed at.
        self._initial_epoch = None
        position = DataPosition(
            self.training_state, train, steps, kwargs.get("initial_epoch") or 0
        )
        # What `Throughput` asks for.
        self.step_timer = StepTimer(train)
        bar = _progress_bar(progress, callbacks, kwargs, self.step_timer)
        others = [*without_writers(_as_list(callbacks)), *bar, *_followers()]
        averages = AveragedWeights(self.optimizer)
        with (
            watch_choices() as choices,
            replaced(self.optimizer, finalize_variable_values=lambda variables: None),
        ):
            log = DataLog(report, lambda: train.packing_report)
            own = [
                *(averages, position, self.step_timer),
                *(log, KernelLog(choices), CurrentWeights()),
            ]
            try:
                return super().fit(
                    train,
                    validation_data=validation_data,
                    callbacks=[*own, *others],
                    **kwargs,
                )
            finally:
                # It holds the data.
                self.step_timer = None

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
        # Within `fit`, its callbacks come as one object, with all of these.
        if not kwargs.get("_use_cached_eval_dataset"):
            bar = _progress_bar(progress, callbacks, kwargs)
            given = without_writers(_as_list(callbacks))
            callbacks = [CurrentWeights(), *given, *bar]
        self._evaluation_seed.state.assign(self._evaluation_start.copy())
        return super().evaluate(
            self._batches(x, batch_size), callbacks=callbacks, **kwargs
        )

    def train_on_batch(
        self,
        x: Any,
        y: None = None,
        sample_weight: None = None,
        class_weight: None = None,
        return_dict: bool = False,
    ) -> Any:
        """Trains on one batch of documents.

        Args:
            x: documents in memory, of any form `fit` accepts.
            y: must be `None`, like `sample_weight` and `class_weight`.
            sample_weight: must be `None`.
            class_weight: must be `None`.
            return_dict: bool, whether metrics come as a dict.

        Returns:
            list of metric values, or a dict.

        Raises:
            TypeError, ValueError: as `fit`.
        """
        refuse_targets(y=y, sample_weight=sample_weight, class_weight=class_weight)
        _refuse_nothing_to_train(self)
        return super().train_on_batch(self._one_batch(x), return_dict=return_dict)

    def test_on_batch(
        self,
        x: Any,
        y: None = None,
        sample_weight: None = None,
        return_dict: bool = False,
    ) -> Any:
        """Measures on one batch of documents; arguments as of `train_on_batch`."""
        refuse_targets(y=y, sample_weight=sample_weight)
        return super().test_on_batch(self._one_batch(x), return_dict=return_dict)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises a `ValueError`: there is no one prediction for a document."""
        raise ValueError(
            "Expected a question that this model answers. Received: predict(). Use "
            "causal_lm.generate(prompts) for texts, or rollout, score, features and "
            "rewards of this model for what training sees."
        )

    predict_on_batch = predict

    @property
    def _reader(self) -> Reader:
        adapters.refuse_new(self.causal_lm.backbone, self._num_adapted)
        return Reader(self.causal_lm, self._check_rows, self._live_blocks)

    def _one_batch(self, x: Any) -> Rows:
        return share_of(self._reader.read(x))

    def _batches(
        self,
        x: Any,
        batch_size: int | None,
        shuffle: bool = False,
        report: DataReport | None = None,
        endless: bool = False,
    ) -> TokenBatches:
        refuse_silent_distribution()
        batches = token_batches(x, self._reader, batch_size, shuffle, self.seed, report)
        batches.endless = batches.endless or endless
        batches.check_end()
        return batches


def _refuse_nothing_to_train(model: Any) -> None:
    if not model.trainable_variables:
        raise ValueError(
            "Expected weights to train. Received: a model all of whose layers are "
            "frozen (trainable=False). Unfreeze some of them, or enable_lora(rank) "
            "before the model is made, and compile it again."
        )


def _without_targets(validation_data: Any) -> Any:
    """Validation documents out of what Keras' users write, `(x, None)`.

    Raises:
        ValueError: for `(x, y)` of arrays or other collections; a tuple of two texts
            is two documents.
    """
    if not isinstance(validation_data, tuple) or not 2 <= len(validation_data) <= 3:
        return validation_data
    x, *others = validation_data
    if all(other is None for other in others):
        return x
    if all(isinstance(part, (str, bytes)) for part in validation_data):
        return validation_data
    raise ValueError(
        "Expected documents alone as `validation_data`: EBFT has no targets or sample "
        f"weights. Received: a tuple of {len(validation_data)}. Pass the documents, "
        "and pairs of prompt and answer as a list of tuples."
    )


def _progress_bar(
    progress: str,
    callbacks: Callbacks,
    options: dict[str, Any],
    timer: StepTimer | None = None,
) -> list[keras.callbacks.Callback]:
    """Ours, unless there is to be none, Keras' own, or one that was given."""
    progress = check_choice("progress", progress, PROGRESS)
    if not is_first():
        options["verbose"] = 0
    bars = keras.callbacks.ProgbarLogger
    given = any(isinstance(callback, bars) for callback in _as_list(callbacks))
    if progress == "full" or options.get("verbose") == 0 or given:
        return []
    return [ShortProgress(timer)]


def _followers() -> list[keras.callbacks.Callback]:
    return [FollowFirst()] if num_processes() > 1 else []


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
    """All callbacks, also of lists within lists, which Keras takes."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    if isinstance(callbacks, (list, tuple)):
        return [callback for part in callbacks for callback in _as_list(part)]
    return [] if callbacks is None else [callbacks]
