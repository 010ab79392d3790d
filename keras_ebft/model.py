"""`EBFTModel`: the parts of Energy-Based Fine-Tuning wired into a Keras model."""

import keras
import numpy as np

from keras_ebft import adapters, bridge, metrics
from keras_ebft.block_sampler import BlockSampler
from keras_ebft.checkpoints import DataPosition, FastForward, TrainingState
from keras_ebft.features import FeatureNetwork
from keras_ebft.functional import ESTIMATORS
from keras_ebft.inputs import as_batch, refuse_targets, split_rows, token_batches
from keras_ebft.inspection import CallableLosses, Inspection, compile_parts
from keras_ebft.kernels.backend import no_gradient, resolve_jit_compile
from keras_ebft.rewards import FeatureMatchingReward
from keras_ebft.step import EBFTStep
from keras_ebft.validation import (
    check_choice,
    check_instance,
    check_int,
    check_number,
    check_some_weight,
)


@keras.saving.register_keras_serializable("keras_ebft")
class EBFTModel(Inspection, keras.Model):
    """Fine-tunes a KerasHub causal language model with EBFT through `fit`.

    For every block of a document the model samples `n` short rollouts, a frozen
    copy of it embeds them and the true continuation, and a policy gradient
    lowers the conditional feature-matching loss

        L_FM = E_c | E_{yhat ~ p(.|c)} phi(c, yhat) - phi(c, y) |^2

    (Jelassi et al., 2026, arXiv:2603.12248). The training loss is
    `policy_weight * L_PG + ce_weight * L_CE`; see `keras_ebft.functional`.
    The trained weights are those of `causal_lm` itself.

    Args:
        causal_lm: `keras_hub.models.CausalLM` of a supported family.
        sampler: `BlockSampler`, by default with the paper's settings for code.
        feature_network: `FeatureNetwork`. The frozen copy is made here, from the
            weights `causal_lm` has now.
        reward: `FeatureMatchingReward`.
        advantage: `"rloo"`, `"group_norm"` or `"reinforce"`.
        policy_weight: float, weight of the policy-gradient loss.
        ce_weight: float, weight of the documents' next-token cross-entropy (the
            paper's gamma: 0, 0.03 or 0.1).
        seed: int or `None`. Decides rollouts and the order of documents: the
            same seed on the same backend gives the same training. Evaluation
            draws from a generator of its own, restarted by every `evaluate`.
        **kwargs: `name`, `dtype`, `trainable` of `keras.Model`.

    Raises:
        TypeError: if a part is of the wrong type.
        ValueError: if a value is out of range or unknown, the backbone's family
            is not supported, or a tapped layer lies outside the network.

    Example:
    ```python
    causal_lm = keras_hub.models.CausalLM.from_preset("gemma3_1b")
    model = keras_ebft.EBFTModel(causal_lm)
    model.compile(keras.optimizers.AdamW(1e-6, beta_2=0.95, weight_decay=0.0))
    model.fit(texts, batch_size=16)
    causal_lm.generate("def fib(n):")
    ```
    """

    def __init__(
        self,
        causal_lm,
        sampler=None,
        feature_network=None,
        reward=None,
        advantage="rloo",
        policy_weight=1.0,
        ce_weight=0.0,
        seed=None,
        **kwargs,
    ):
        bridge.check_supported(causal_lm)
        adapters.freeze_base(causal_lm.backbone)
        super().__init__(**kwargs)
        self.sampler = _part("sampler", sampler, BlockSampler)
        self.feature_network = _part("feature_network", feature_network, FeatureNetwork)
        self.reward = _part("reward", reward, FeatureMatchingReward)
        self.advantage = check_choice("advantage", advantage, ESTIMATORS)
        _check_samples(advantage, self.sampler.num_samples)
        self.policy_weight = check_number("policy_weight", policy_weight, 0.0)
        self.ce_weight = check_number("ce_weight", ce_weight, 0.0)
        check_some_weight(policy_weight=self.policy_weight, ce_weight=self.ce_weight)
        if seed is None:
            seed = int(np.random.randint(2**31 - 3))
        self.seed = check_int("seed", seed, 0)

        self.causal_lm = causal_lm
        self._step = EBFTStep(
            causal_lm, self.sampler, self.feature_network, self.reward, advantage
        )
        self.frozen_network = self._step.frozen.model
        self._compiled = compile_parts(
            self._step, lambda: [*causal_lm.variables, *self.frozen_network.variables]
        )
        self._training_seed = keras.random.SeedGenerator(self.seed)
        self._evaluation_seed = keras.random.SeedGenerator(self.seed + 1)
        self._inspection_seed = keras.random.SeedGenerator(self.seed + 2)
        self._evaluation_start = self._evaluation_seed.state.numpy()
        self._trackers = metrics.make_trackers(self.reward.block_measures)
        self.training_state = TrainingState(
            self._saved_variables, lambda: self.metrics_variables
        )
        self.built = True

    def train_step(self, *state_and_data):
        """One update of the policy on one batch of documents, on every backend.

        1. `call`: the policy reads the documents once; every block and sample
           continues them token by token (`BlockSampler`); the frozen network
           embeds rollouts and truth (`FeatureNetwork`); rewards and advantages
           come from their inner products (`FeatureMatchingReward`); the policy
           scores the sampled tokens against the same reading, with gradient.
        2. `compute_loss`: `policy_weight * L_PG + ce_weight * L_CE`.
        3. Keras' own trainer: gradients, clipping, the optimizer's update.
        4. `compute_metrics`: every quantity of the step into its running mean.

        Args:
            *state_and_data: what the backend's trainer hands in: the batch, on
                JAX after the state of all variables.

        Returns:
            dict of logs, on JAX together with the new state.
        """
        *state, data = state_and_data
        return super().train_step(*state, as_batch(data))

    def test_step(self, *state_and_data):
        """`train_step` without gradients and update."""
        *state, data = state_and_data
        with no_gradient():
            return super().test_step(*state, as_batch(data))

    def call(self, inputs, training=False):
        """Rollouts, rewards and log-probabilities of a batch of documents.

        Args:
            inputs: dict of `token_ids` int32 `[B, T]` and `padding_mask` bool
                `[B, T]`, padded on the right.
            training: bool, which random generator is drawn from.

        Returns:
            dict: `token_ids`, `log_prob`, `entropy` `[B, n, K, G]`; `alignment`,
            `diversity`, `reward`, `advantage` `[B, n, K]`, 0 in dead blocks; the
            reward's measures and `block_mask` `[B, K]`; `document_log_prob` and
            `document_mask` `[B, T - 1]`.
        """
        return self._step(
            inputs["token_ids"],
            inputs["padding_mask"],
            seed=self._training_seed if training else self._evaluation_seed,
            train_documents=self.ce_weight > 0.0,
        )

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The weighted loss of what `call` returned; a float32 scalar."""
        terms = metrics.loss_terms(y_pred)
        loss = self.policy_weight * terms["policy_loss"]
        if self.ce_weight:
            loss = loss + self.ce_weight * terms["ce_loss"]
        return sum(self.losses, start=loss)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Adds one step to the running means; returns their values."""
        with no_gradient():
            measured = metrics.measure(y_pred, self.reward.block_measures)
            for name, (value, weight) in measured.items():
                self._trackers[name].update_state(value, sample_weight=weight)
        return self.get_metrics_result()

    @property
    def losses(self):
        """Layer losses (a list); called with `(x, rollouts)`, a dict of scalars."""
        return CallableLosses(super().losses, self._losses_of)

    def compile(
        self,
        optimizer=None,
        *,
        run_eagerly=False,
        jit_compile="auto",
        steps_per_execution=1,
        auto_scale_loss=True,
        **unsupported,
    ):
        """Configures training.

        Args:
            optimizer: any Keras optimizer or its name. By default the paper's:
                AdamW at 1e-6, betas 0.9 and 0.95, no decay, global clip norm 1.
            run_eagerly: bool, run step by step, for debugging.
            jit_compile: bool or `"auto"`: compiled on JAX and TensorFlow, eager
                on PyTorch.
            steps_per_execution: int, steps per compiled call (not on PyTorch).
            auto_scale_loss: bool, scale the loss under `mixed_float16`.
            **unsupported: losses and metrics of other models, refused.

        Raises:
            ValueError: for losses or metrics, which EBFT brings itself.
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
        if run_eagerly and jit_compile == "auto":
            jit_compile = False
        super().compile(
            optimizer=optimizer,
            run_eagerly=run_eagerly,
            jit_compile=resolve_jit_compile(jit_compile),
            steps_per_execution=steps_per_execution,
            auto_scale_loss=auto_scale_loss,
        )

    def compile_from_config(self, config):
        """Compiles as the saved model was, with an optimizer of its own."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force=False):
        """Makes the function that trains on one batch, as Keras does."""
        super().make_train_function(force)
        if not isinstance(self.train_function, FastForward):
            self.train_function = FastForward(
                self.train_function, self.steps_per_execution
            )

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        *,
        callbacks=None,
        validation_data=None,
        validation_split=0.0,
        validation_batch_size=None,
        shuffle=True,
        **kwargs,
    ):
        """Fine-tunes on documents.

        Args:
            x: list of strings; integer array `[N, T]`; dict with `token_ids` and
                optionally `padding_mask`; or a `tf.data.Dataset`, `PyDataset`,
                torch `DataLoader` or generator that yields batches of these.
            y: must be `None`; documents are their own targets.
            batch_size: int, documents per step for data in memory (default 16).
            callbacks: `keras.callbacks.Callback`, a list of them, or `None`.
            validation_data: documents of any accepted form, or `None`.
            validation_split: float in [0, 1), share of in-memory documents, taken
                from the end, to validate on.
            validation_batch_size: int, by default `batch_size`.
            shuffle: bool, reorder in-memory documents every epoch.
            **kwargs: further arguments of `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            TypeError: for token ids that are not integers.
            ValueError: for documents too short to hold a block, and whatever
                else is wrong with them; the message says what to do.
        """
        refuse_targets(y=y, **kwargs)
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
        if not isinstance(callbacks, (list, tuple)):
            callbacks = [] if callbacks is None else [callbacks]
        return super().fit(
            train,
            validation_data=validation_data,
            callbacks=[position, *callbacks],
            **kwargs,
        )

    def evaluate(self, x=None, y=None, batch_size=None, **kwargs):
        """Measures on documents, always with the same random numbers.

        Args:
            x: documents of any form `fit` accepts.
            y: must be `None`.
            batch_size: int, documents per step for data in memory (default 16).
            **kwargs: further arguments of `keras.Model.evaluate`.

        Returns:
            list of metric values, or a dict with `return_dict=True`.

        Raises:
            TypeError: for token ids that are not integers.
            ValueError: for anything else wrong with the documents.
        """
        refuse_targets(y=y, **kwargs)
        self._evaluation_seed.state.assign(self._evaluation_start.copy())
        return super().evaluate(self._batches(x, batch_size), **kwargs)

    def get_config(self):
        """The constructor's arguments, parts serialized as Keras does.

        `adapters` is for `from_config` alone: the configuration of a KerasHub
        backbone leaves out that it has some.
        """
        causal_lm = keras.saving.serialize_keras_object(self.causal_lm)
        # Compiled for `generate` only; KerasHub compiles it again when it is built.
        causal_lm.pop("compile_config", None)
        return {
            **super().get_config(),
            "causal_lm": causal_lm,
            "adapters": adapters.adapter_config(self.causal_lm.backbone),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
            "feature_network": keras.saving.serialize_keras_object(
                self.feature_network
            ),
            "reward": keras.saving.serialize_keras_object(self.reward),
            "advantage": self.advantage,
            "policy_weight": self.policy_weight,
            "ce_weight": self.ce_weight,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Builds the model from what `get_config` returned."""
        parts = ("causal_lm", "sampler", "feature_network", "reward")
        config = {
            name: keras.saving.deserialize_keras_object(value)
            if name in parts and isinstance(value, dict)
            else value
            for name, value in config.items()
        }
        enabled = config.pop("adapters", None)
        adapters.enable_adapters(config["causal_lm"].backbone, enabled)
        return cls(**config)

    def _saved_variables(self):
        """What Keras does not save, or not apart from other weights."""
        return {
            "training_seed": self._training_seed.state,
            "evaluation_seed": self._evaluation_seed.state,
            "inspection_seed": self._inspection_seed.state,
            **adapters.exact_variables(self.causal_lm.backbone),
        }

    def _batches(self, x, batch_size, shuffle=False):
        return token_batches(
            x,
            self.causal_lm,
            check_length=self.sampler.geometry,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
        )


def _part(name, value, expected):
    if value is None:
        return expected()
    return check_instance(
        name, value, expected, f"Pass a keras_ebft.{expected.__name__} or None."
    )


def _check_samples(advantage, num_samples):
    if advantage == "group_norm" and num_samples == 1:
        raise ValueError(
            'Expected num_samples of at least 2 with advantage="group_norm", which '
            "compares the rollouts of one block. Received: num_samples=1. Use more "
            'samples or advantage="reinforce".'
        )
