"""`EBFTModel`: the parts of Energy-Based Fine-Tuning wired into a Keras model."""

from typing import Any, cast

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_ebft.backend.distribution import (
    refuse_handed_over,
    refuse_silent_distribution,
)
from keras_ebft.backend.replicas import (
    counted_once,
    follow_first,
    from_first,
    shared_step,
)
from keras_ebft.backend.runtime import after, no_gradient, run_in_state
from keras_ebft.configurable import shown
from keras_ebft.data.row_batches import Rows
from keras_ebft.features import FeatureNetwork
from keras_ebft.functional import ESTIMATORS
from keras_ebft.inspection import Inspection, compile_stages
from keras_ebft.layout.documents import Documents, read_documents
from keras_ebft.networks import (
    adapters,
    check_supported,
    complete_config,
    dtype_policy_name,
    resolve_rematerialize,
    vocabulary_size,
)
from keras_ebft.networks.frozen_reader import (
    FrozenReader,
    frozen_readers,
    refuse_shared_paths,
)
from keras_ebft.notices import note_frozen_copies, say_notices
from keras_ebft.objectives.critic import Critic, CriticHead
from keras_ebft.objectives.objective import Objective, check_combination
from keras_ebft.records import Batch, Experience, StepOutputs
from keras_ebft.rewards import FeatureMatchingReward, Reward
from keras_ebft.samplers import BlockSampler
from keras_ebft.step import EBFTStep
from keras_ebft.training import metrics
from keras_ebft.training.batches import as_batch
from keras_ebft.training.checkpoints import TrainingState
from keras_ebft.training.serialization import Serialization
from keras_ebft.training.trainer import DocumentTrainer
from keras_ebft.typing import Tensor, Weight
from keras_ebft.validation import (
    MOST_INT,
    check_choice,
    check_instance,
    check_int,
    check_micro_batches,
)


@keras.saving.register_keras_serializable("keras_ebft")
class EBFTModel(Inspection, Serialization, DocumentTrainer):
    """Fine-tunes a KerasHub causal language model with EBFT through `fit`.

    For every block of a document the model samples `n` short rollouts, a frozen
    copy of it embeds them and the true continuation, and a policy gradient
    lowers the conditional feature-matching loss

        L_FM = E_c | E_{yhat ~ p(.|c)} phi(c, yhat) - phi(c, y) |^2

    (Jelassi et al., 2026, arXiv:2603.12248). The training loss is

        L = policy_weight L_PG + ce_weight L_CE + kl_weight L_KL - entropy_weight H

    see `keras_ebft.functional`. The trained weights are those of `causal_lm` itself.

    Weights are floats or `keras.optimizers.schedules.LearningRateSchedule`s, which
    get the number of training steps so far.

    Args:
        causal_lm: `keras_hub.models.CausalLM` of a supported family.
        sampler: `BlockSampler`, by default with the paper's settings for code.
        feature_network: `FeatureNetwork`. The frozen copy is made here, from the
            weights `causal_lm` has now; with adapters it is the base without them.
        reward: `FeatureMatchingReward` by default, or another `Reward`:
            `CharacteristicFunctionReward`, `VerifierReward`, `RewardSum` or one's
            own.
        advantage: `"rloo"`, `"group_norm"` or `"reinforce"`.
        policy_weight: weight of the policy-gradient loss.
        ce_weight: weight of the documents' next-token cross-entropy (the paper's
            gamma: 0, 0.03 or 0.1).
        kl_weight: weight of the estimated KL divergence of the policy from the
            model as it is now, over generated tokens; with adapters from the base
            without them, also where they are trained already. Anything but 0 also
            measures `kl`.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`, see `keras_ebft.functional`.
        entropy_weight: weight of the entropy bonus at generated tokens.
        policy_loss: `"token"`, a probability ratio for every token, or
            `"sequence"`, one for every rollout (GSPO, arXiv:2507.18071).
        updates_per_rollout: int, optimizer steps per batch of rollouts. With more
            than one, documents are read anew in each.
        clip_range: float or `(low, high)`, how far ratios may leave 1 before they
            are clipped (PPO); needs `updates_per_rollout` above 1.
        critic: `Critic` (experimental) or `None`.
        rematerialize: bool, whether decoder layers run again in the backward pass
            instead of keeping their activations; `None`: if `causal_lm` was built
            within `keras.RematScope(mode="full")`.
        micro_batches: int, groups of samples that are read one after another, each
            keeping no activations; divides `num_samples`. The same gradient.
        seed: int or `None`. Decides rollouts, the order of documents and how a
            critic's head starts: the same seed on the same backend gives the same
            training. Evaluation draws from a generator of its own, restarted by
            every `evaluate`.
        **kwargs: `name`, `dtype`, `trainable` of `keras.Model`.

    Raises:
        TypeError: if a part is of the wrong type.
        ValueError: if a value is out of range or unknown, settings do not go
            together, the backbone's family is not supported, or a tapped layer
            lies outside the network.

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
        causal_lm: keras_hub.models.CausalLM,
        sampler: BlockSampler | None = None,
        feature_network: FeatureNetwork | None = None,
        reward: Reward | None = None,
        advantage: str = "rloo",
        policy_weight: Weight = 1.0,
        ce_weight: Weight = 0.0,
        kl_weight: Weight = 0.0,
        kl_estimator: str = "k2",
        entropy_weight: Weight = 0.0,
        policy_loss: str = "token",
        updates_per_rollout: int = 1,
        clip_range: float | tuple[float, float] | None = None,
        critic: Critic | None = None,
        rematerialize: bool | None = None,
        micro_batches: int = 1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_silent_distribution()
        refuse_handed_over(causal_lm)
        check_supported(causal_lm)
        complete_config(causal_lm.backbone)
        adapters.freeze_base(causal_lm.backbone)
        # Before it is copied.
        follow_first(causal_lm.variables)
        # Not the global policy: the backbone's own decides on loss scaling.
        kwargs.setdefault("dtype", dtype_policy_name(causal_lm.backbone))
        super().__init__(**kwargs)
        # Batches are records of tensors, whose floats keep their precision.
        self._convert_input_args = False
        self._allow_non_tensor_positional_args = True
        self.sampler = _part("sampler", sampler, BlockSampler)
        self.feature_network = _part("feature_network", feature_network, FeatureNetwork)
        self.reward = _part("reward", reward, Reward, FeatureMatchingReward)
        self.advantage = check_choice("advantage", advantage, ESTIMATORS)
        self.objective = Objective(
            policy_weight,
            ce_weight,
            kl_weight,
            entropy_weight,
            kl_estimator,
            policy_loss,
            updates_per_rollout,
            clip_range,
        )
        self.critic = None if critic is None else _part("critic", critic, Critic)
        check_combination(
            self.objective,
            self.sampler,
            self.feature_network,
            self.reward,
            advantage,
            self.critic,
        )
        backbone = causal_lm.backbone
        self.sampler.check_vocabulary(vocabulary_size(backbone))
        self.rematerialize = resolve_rematerialize(rematerialize, backbone)
        samples = self.sampler.num_samples
        self.micro_batches = check_micro_batches(micro_batches, samples)
        self.causal_lm = causal_lm
        self._num_adapted = len(adapters.adapted_layers(backbone))
        self._choose_seed(seed)
        self._build_step()
        self._build_state()
        # A critic's head.
        follow_first(self.variables)
        note_frozen_copies(self, self._training_steps)
        self.built = True

    @classmethod
    def sft(
        cls,
        causal_lm: keras_hub.models.CausalLM,
        seed: int | None = None,
        **kwargs: Any,
    ) -> "EBFTModel":
        """Plain supervised fine-tuning: next-token cross-entropy, no rollouts.

        The gradient is that of `causal_lm.fit` on the same tokens up to a factor:
        the loss is divided by the tokens that count, in place of all places of the
        batch, padding too. Packed documents and answer masks are honoured.
        Feature-matching loss is not
        measured: build an `EBFTModel` on the same `causal_lm` and `evaluate` it.

        Args:
            causal_lm: `keras_hub.models.CausalLM` of a supported family.
            seed: int or `None`, decides the order of documents.
            **kwargs: further arguments of the constructor.
        """
        return cls(causal_lm, policy_weight=0.0, ce_weight=1.0, seed=seed, **kwargs)

    def _build_step(self) -> None:
        """The step, and the frozen networks and the critic it asks."""
        backbone, rollouts = self.causal_lm.backbone, self.objective.needs_rollouts
        trains_features = self.critic is not None and self.critic.train_features
        features, reference = frozen_readers(
            self.feature_network,
            backbone,
            features=rollouts and self.reward.needs_features,
            reference=self.objective.needs_reference,
            live=trains_features,
        )
        if trains_features:
            cast(FrozenReader, features).learn(self.rematerialize)
        readers = {id(r): r for r in (features, reference) if r is not None}
        self.frozen_networks = [
            r.model for r in readers.values() if r.model is not None
        ]
        refuse_shared_paths(self.frozen_networks, self.causal_lm)
        self.reward.prepare(self.causal_lm)
        self.critic_head = None
        if self.critic is not None:
            steps = self.sampler.rollout_length
            width = self.feature_network.num_features(
                cast(FrozenReader, features).network, steps
            )
            self.critic_head = CriticHead(width, self.seed)
        self._step = EBFTStep(
            self.causal_lm,
            self.sampler,
            self.feature_network,
            (features, reference),
            self.reward,
            self.advantage,
            self.objective,
            self.critic,
            self.critic_head,
            self.rematerialize,
            self.micro_batches,
        )
        self._compiled = compile_stages(self._step, self._read_variables)
        say_notices(self)

    def _choose_seed(self, seed: int | None) -> None:
        """The seed that was given, or one of this run: the same in all processes."""
        if seed is None:
            seed = from_first(int(np.random.randint(2**31 - 3)))
        # Two generators more count on from it.
        self.seed = check_int("seed", seed, 0, MOST_INT - 2)

    def _build_state(self) -> None:
        """Random generators, the count of steps, and the running means."""
        self._training_seed = keras.random.SeedGenerator(self.seed)
        self._evaluation_seed = keras.random.SeedGenerator(self.seed + 1)
        self._inspection_seed = keras.random.SeedGenerator(self.seed + 2)
        self._evaluation_start = self._evaluation_seed.state.numpy()
        self._training_steps = self.add_weight(
            name="training_steps",
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
        )
        self._trackers = metrics.make_trackers(self._measured_names())
        # In the order in which they came: files of earlier versions hold the first.
        self._skipped_updates = metrics.SkippedUpdates()
        self._later_trackers = metrics.make_trackers(self._later_names())
        self._gradient_norm = metrics.GradientNorm()
        self.training_state = TrainingState(
            self._saved_variables,
            lambda: self.metrics_variables,
            lambda: adapters.alphas(self.causal_lm.backbone),
        )

    def __repr__(self) -> str:
        parts = ("causal_lm", "sampler", "feature_network", "reward", "advantage")
        others = ("critic", "rematerialize", "micro_batches", "seed")
        settings = {name: getattr(self, name) for name in parts}
        settings |= self.objective.get_config()
        settings |= {name: getattr(self, name) for name in others}
        return shown(type(self).__name__, settings)

    def _read_variables(self) -> list[keras.Variable]:
        """All that the stages of a step read, a list of variables."""
        frozen = [v for model in self.frozen_networks for v in model.variables]
        return [*self.causal_lm.variables, *frozen]

    @property
    def steps_trained(self) -> int:
        """Batches that were trained on in the model's life, an int.

        Asking waits for the device.
        """
        objective = self.objective
        repeats = objective.updates_per_rollout if objective.repeats_updates else 1
        return int(self._training_steps) // repeats

    @property
    def feature_reader(self) -> FrozenReader | None:
        """`FrozenReader` of the network that features come from, or `None`."""
        return self._step.feature_reader

    @property
    def frozen_network(self) -> keras.Model | None:
        """The `keras.Model` that features come from; `None` if there is none."""
        return None if self.feature_reader is None else self.feature_reader.model

    def train_step(self, *state_and_data: Any) -> Any:
        """One update of the policy on one batch of documents, on every backend.

        1. `call` runs the step (`keras_ebft.step.EBFTStep`): the policy reads the
           documents once; every block and sample continues them token by token
           (`BlockSampler`); the frozen network embeds rollouts and truth
           (`FeatureNetwork`); rewards and advantages come from their inner
           products (`Reward`); the policy scores the sampled tokens against the
           same reading, with gradient; from the scores come the terms of the loss.
        2. `compute_loss` weighs them: `L = policy_weight L_PG + ce_weight L_CE +
           kl_weight L_KL - entropy_weight H`.
        3. Keras' own trainer: gradients, clipping, the optimizer's update, which is
           skipped and counted if it is not finite.
        4. `compute_metrics`: every quantity of the step into its running mean.

        With several updates per rollout, sampling and rewards come first, and 1
        to 4 learn from the same experience again each time.

        Args:
            *state_and_data: what the backend's trainer hands in: the batch, on
                JAX after the state of all variables.

        Returns:
            dict of logs, on JAX together with the new state.
        """
        *state, data = state_and_data
        batch = Batch(read_documents(as_batch(data)))
        # Where the data are at their end, nothing of a step may have happened.
        with (
            after(batch.documents.token_ids),
            shared_step(),
            self._whole_step(state),
        ):
            if not self.objective.repeats_updates:
                return self._update(state, batch)
            experience, state = run_in_state(
                self, state, lambda: self._explore(batch.documents)
            )
            batch = batch._replace(experience=experience)
            for _ in range(self.objective.updates_per_rollout):
                result = self._update(state, batch)
                state = [result[1]] if state else state
            return result

    def _explore(self, documents: Documents) -> Experience:
        self._follow_policy()
        return self._step.explore_first(documents, self._training_seed)

    def _follow_policy(self) -> None:
        decay = self.feature_network.ema_decay
        if decay is not None and self.feature_reader is not None:
            with no_gradient():
                reader = cast(FrozenReader, self.feature_reader)
                reader.follow(self.causal_lm.backbone, decay)

    def test_step(self, *state_and_data: Any) -> Any:
        """`train_step` without gradients and update."""
        *state, data = state_and_data
        batch = Batch(read_documents(as_batch(data)))
        with no_gradient(), after(batch.documents.token_ids), shared_step():
            returned = super().test_step(*state, (batch,))
        logs = returned[0] if state else returned
        # There are no updates.
        for metric in (self._skipped_updates, self._gradient_norm):
            del logs[metric.name]
        return returned

    def call(
        self, inputs: Batch | dict[str, Tensor], training: bool = False
    ) -> StepOutputs:
        """One step up to its loss: `keras_ebft.step.EBFTStep`.

        Args:
            inputs: `keras_ebft.records.Batch`, or a dict of `token_ids` int32
                `[B, T]` and `padding_mask` bool `[B, T]`, padded on the right;
                optionally `segment_ids` int32 and `answer_mask` bool `[B, T]`,
                `anchors` int32 `[B, K]`.
            training: bool, which random generator is drawn from.

        Returns:
            `keras_ebft.records.StepOutputs`.
        """
        if not isinstance(inputs, Batch):
            inputs = Batch(read_documents(as_batch(inputs)))
        documents, experience = inputs
        if training and experience is None:
            self._follow_policy()
        seed = self._training_seed if training else self._evaluation_seed
        outputs = self._step(documents, seed, experience)
        # Evaluation weighs as the last training step did.
        steps = self._training_steps
        weighed_at = steps + 0 if training else ops.maximum(steps - 1, 0)
        weighted = self.objective.weighted(outputs.terms, weighed_at)
        if self.losses:
            weighted["regularization"] = counted_once(sum(self.losses))
        return outputs._replace(weighted=weighted)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The weighted loss of what `call` returned; a float32 scalar."""
        if training:
            self._training_steps.assign(self._training_steps + 1)
        return sum(y_pred.weighted.values())

    def compute_metrics(
        self, x: Any, y: Any, y_pred: StepOutputs, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Adds one step to the running means; returns their values."""
        with no_gradient():
            measured = metrics.measure_documents(y_pred)
            if y_pred.experience is not None:
                measured |= metrics.measure_rollouts(y_pred)
            trackers = {**self._trackers, **self._later_trackers}
            for name, tracker in trackers.items():
                if name in measured:
                    value, weight = measured[name]
                    tracker.update_state(value, sample_weight=weight)
            weights = metrics.term_weights(y_pred)
            for term, value in (y_pred.weighted or {}).items():
                self._loss_tracker.add(term, value, weights[term])
        return self.get_metrics_result()

    def _measured_names(self) -> tuple[str, ...]:
        if not self.objective.needs_rollouts:
            return metrics.DOCUMENT_MEASURES
        names = (*self.reward.block_measures, *metrics.REWARD_MEASURES)
        if self.objective.needs_reference:
            names = (*names, "kl")
        if self.critic is not None:
            names = (*names, *metrics.CRITIC_MEASURES)
        return (*names, *metrics.DOCUMENT_MEASURES)

    def _later_names(self) -> tuple[str, ...]:
        if not self.objective.needs_rollouts:
            return ()
        names: tuple[str, ...] = metrics.LATER_MEASURES
        if isinstance(self.reward, FeatureMatchingReward):
            names = (*names, *metrics.MATCHING_MEASURES)
        if self.sampler.has_stop_tokens:
            names = (*names, *metrics.STOP_MEASURES)
        return names

    @property
    def _runs_python(self) -> bool:
        return self.objective.needs_rollouts and self.reward.runs_python

    def _live_blocks(self, rows: Rows) -> np.ndarray | None:
        if not self.objective.needs_rollouts:
            return None
        return self.sampler.live_blocks(rows, bool(self._step.stop_token_ids))

    def _check_rows(self, rows: Rows) -> None:
        if self.objective.needs_rollouts:
            self.sampler.check_rows(rows)
            self._step.check_positions(rows["token_ids"].shape[1])


def _part(name: str, value: Any, expected: type, default: type | None = None) -> Any:
    default = default or expected
    if value is None:
        return default()
    return check_instance(
        name, value, expected, f"Pass a keras_ebft.{default.__name__} or None."
    )
