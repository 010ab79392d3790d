"""The loss as a weighted sum of terms, its settings checked together."""

from typing import Any, cast

import keras
from keras import ops

from keras_ebft.functional.losses import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    kl_estimate,
    policy_loss,
    probability_ratio,
    token_weights,
)
from keras_ebft.functional.masking import masked_mean, only_where
from keras_ebft.objectives.critic import Critic
from keras_ebft.records import DocumentScores, Experience, LossTerms, RolloutScores
from keras_ebft.typing import Tensor, Weight
from keras_ebft.validation import (
    check_choice,
    check_clip_range,
    check_int,
    check_some_weight,
    check_weight,
    is_zero,
)

# Each weight, and the term of the loss that it weighs.
TERMS = {
    "policy_weight": "policy_loss",
    "ce_weight": "ce_loss",
    "kl_weight": "kl",
    "entropy_weight": "entropy",
}
WEIGHTS = tuple(TERMS)


class Objective:
    """`policy_weight L_PG + ce_weight L_CE + kl_weight L_KL - entropy_weight H`.

    Args:
        policy_weight: float or `LearningRateSchedule`; so are the other weights.
        ce_weight: of the documents' next-token cross-entropy.
        kl_weight: of the estimated divergence from the initial model.
        entropy_weight: of the entropy at generated tokens.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`.
        policy_loss: `"token"` or `"sequence"`, see `probability_ratio`.
        updates_per_rollout: int.
        clip_range: float, `(low, high)` or `None`.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range, unknown, or of no effect.
    """

    def __init__(
        self,
        policy_weight: Weight,
        ce_weight: Weight,
        kl_weight: Weight,
        entropy_weight: Weight,
        kl_estimator: str,
        policy_loss: str,
        updates_per_rollout: int,
        clip_range: float | tuple[float, float] | None,
    ) -> None:
        self.policy_weight = check_weight("policy_weight", policy_weight)
        self.ce_weight = check_weight("ce_weight", ce_weight)
        self.kl_weight = check_weight("kl_weight", kl_weight)
        self.entropy_weight = check_weight("entropy_weight", entropy_weight)
        check_some_weight(**self.weights)
        self.kl_estimator = check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        self.policy_loss = check_choice("policy_loss", policy_loss, POLICY_LOSSES)
        self.updates_per_rollout = check_int(
            "updates_per_rollout", updates_per_rollout, 1
        )
        self.clip_range = check_clip_range(clip_range)
        if self.clip_range is not None and self.updates_per_rollout == 1:
            raise ValueError(
                "Expected no `clip_range` with one update per rollout, whose ratios "
                f"are all 1 and never clipped. Received: clip_range={clip_range!r}, "
                "updates_per_rollout=1. Leave it out, or raise updates_per_rollout."
            )

    @property
    def weights(self) -> dict[str, Weight]:
        """The weights by name."""
        return {name: getattr(self, name) for name in WEIGHTS}

    @property
    def trains_documents(self) -> bool:
        """Whether the cross-entropy of documents has a gradient."""
        return not is_zero(self.ce_weight)

    @property
    def needs_rollouts(self) -> bool:
        """Whether anything is learned from rollouts."""
        return any(
            not is_zero(weight)
            for name, weight in self.weights.items()
            if name != "ce_weight"
        )

    @property
    def repeats_updates(self) -> bool:
        """Whether the same rollouts are learned from more than once."""
        return self.updates_per_rollout > 1 and self.needs_rollouts

    @property
    def needs_reference(self) -> bool:
        """Whether the initial model's log-probabilities are needed."""
        return not is_zero(self.kl_weight)

    def terms(
        self,
        document_scores: DocumentScores,
        experience: Experience | None = None,
        scores: RolloutScores | None = None,
    ) -> LossTerms:
        """The terms of the loss, before their weights.

        Args:
            document_scores: `DocumentScores`.
            experience: `Experience`, or `None` where documents alone are learned
                from.
            scores: `RolloutScores` of its rollouts.

        Returns:
            `LossTerms`.
        """
        ce_loss = masked_mean(-document_scores.log_prob, document_scores.mask)
        if experience is None:
            return LossTerms(ce_loss)
        scores = cast(RolloutScores, scores)
        rollouts, frozen, judged, old_log_prob = experience
        counted = ops.cast(rollouts.counted, "float32")
        ratio = probability_ratio(
            scores.log_prob, old_log_prob, counted, self.policy_loss
        )
        terms = LossTerms(
            ce_loss,
            policy_loss=policy_loss(
                ratio,
                judged.advantage,
                token_weights(counted, rollouts.blocks.starts),
                self.clip_range,
            ),
            entropy=masked_mean(scores.entropy, counted),
        )
        if self.needs_reference:
            estimate = kl_estimate(
                only_where(counted, scores.log_prob),
                only_where(counted, frozen.reference_log_prob),
                self.kl_estimator,
            )
            terms = terms._replace(kl=masked_mean(estimate, counted))
        return terms

    def loss(self, terms: LossTerms, step: Tensor) -> Tensor:
        """`policy_weight L_PG + ce_weight L_CE + kl_weight L_KL - entropy_weight H`.

        A critic's loss is added as it is.

        Args:
            terms: `LossTerms`.
            step: int32 scalar tensor, training steps so far, for schedules.

        Returns:
            float32 scalar.
        """
        return sum(self.weighted(terms, step).values(), start=0.0)

    def weighted(self, terms: LossTerms, step: Tensor) -> dict[str, Tensor]:
        """What is summed up to the loss, by name of the term.

        Args:
            terms: `LossTerms`.
            step: int32 scalar tensor, training steps so far, for schedules.

        Returns:
            dict of float32 scalars.
        """
        found = {}
        if terms.critic_loss is not None:
            found["critic_loss"] = terms.critic_loss
        for name, term in TERMS.items():
            weight = getattr(self, name)
            if is_zero(weight):
                continue
            value = weight if isinstance(weight, float) else weight(step)
            sign = -1.0 if term == "entropy" else 1.0
            found[term] = sign * ops.cast(value, "float32") * getattr(terms, term)
        return found

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        weights = {
            name: weight
            if isinstance(weight, float)
            else keras.saving.serialize_keras_object(weight)
            for name, weight in self.weights.items()
        }
        return {
            **weights,
            "kl_estimator": self.kl_estimator,
            "policy_loss": self.policy_loss,
            "updates_per_rollout": self.updates_per_rollout,
            "clip_range": None if self.clip_range is None else list(self.clip_range),
        }


def check_combination(
    objective: Objective,
    sampler: Any,
    feature_network: Any,
    reward: Any,
    advantage: str,
    critic: Critic | None,
) -> None:
    """Checks settings of different parts that must go together.

    Raises:
        ValueError: for combinations that would quietly mean something else.
    """
    if critic is not None:
        _check_critic(critic, objective, feature_network, reward)
    if not objective.needs_rollouts:
        return
    if sampler.num_samples == 1:
        if advantage != "reinforce":
            raise ValueError(
                f"Expected num_samples of at least 2 with advantage={advantage!r}, "
                "whose baseline comes from the other rollouts of a block. Received: "
                'num_samples=1. Use more samples or advantage="reinforce".'
            )
        if reward.diversity_weight:
            raise ValueError(
                "Expected num_samples of at least 2 with a diversity reward, which "
                "compares the rollouts of a block. Received: num_samples=1 and "
                f"diversity_weight={reward.diversity_weight}. Use more samples or "
                "diversity_weight=0."
            )
    if feature_network.pooling == "token" and objective.policy_loss == "sequence":
        raise ValueError(
            'Expected policy_loss="token" with pooling="token", which rewards each '
            'token by itself. Received: policy_loss="sequence", which gives all of '
            "them one ratio. Change one of them."
        )
    if feature_network.ema_decay is not None and not reward.needs_features:
        raise ValueError(
            "Expected no `ema_decay` with a reward that looks at no features. "
            f"Received: ema_decay={feature_network.ema_decay} and "
            f"{type(reward).__name__}. Leave it out."
        )


def _check_critic(
    critic: Critic, objective: Objective, feature_network: Any, reward: Any
) -> None:
    if not objective.needs_rollouts or not reward.needs_features:
        raise ValueError(
            "Expected a critic beside a reward that looks at features of rollouts. "
            f"Received: {type(reward).__name__} with weights {objective.weights}. "
            "Leave the critic out."
        )
    if critic.train_features and feature_network.ema_decay is not None:
        raise ValueError(
            "Expected a feature network that either follows the policy or learns with "
            f"the critic. Received: ema_decay={feature_network.ema_decay} and "
            "train_features=True. Leave one of them out."
        )
