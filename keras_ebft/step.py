"""One step of Energy-Based Fine-Tuning, top to bottom.

`EBFTStep.__call__` is the algorithm (Jelassi et al., 2026, arXiv:2603.12248);
the stages it calls follow in the order in which they are called. What differs from
the authors' code: a document is read once, and blocks, samples, rollout and policy
gradient share its keys and values; nothing above the last tapped layer runs for
features; rewards come from n x n inner products.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import keras_hub
from keras import ops

from keras_ebft.backend.replicas import all_rows
from keras_ebft.backend.runtime import no_gradient
from keras_ebft.backend.sample_groups import in_groups
from keras_ebft.features import FeatureNetwork
from keras_ebft.kernels import linear_logprob
from keras_ebft.layout.blocks import Blocks
from keras_ebft.layout.documents import Documents, take_tokens
from keras_ebft.layout.draws import draw_numbers
from keras_ebft.networks import (
    OutputHead,
    end_token_ids,
    maximum_length,
    output_head,
    routed_backbone,
)
from keras_ebft.networks.frozen_reader import FrozenReader
from keras_ebft.networks.prefix_cache import (
    DocumentState,
    read_blocks,
    read_document,
    stop_gradient,
)
from keras_ebft.objectives.critic import Critic, CriticHead
from keras_ebft.objectives.objective import Objective
from keras_ebft.records import (
    DocumentScores,
    Experience,
    FrozenReading,
    Judged,
    Rollouts,
    RolloutScores,
    StepOutputs,
)
from keras_ebft.rewards import Reward
from keras_ebft.samplers import BlockSampler, before_stop, ended
from keras_ebft.typing import Seed, Tensor


class EBFTStep:
    """What happens to a batch of documents between input and loss.

    Args:
        causal_lm: supported `keras_hub.models.CausalLM`, the policy.
        sampler: `BlockSampler`.
        feature_network: `FeatureNetwork`.
        readers: `(feature reader, reference reader)`, see `frozen_readers`.
        reward: `Reward`.
        advantage: name of the advantage estimator.
        objective: `Objective`.
        critic: `Critic` or `None`.
        critic_head: `CriticHead` or `None`.
        rematerialize: bool, whether the policy's decoder layers run again in the
            backward pass.
        micro_batches: int, groups of samples that are read one after another.
    """

    def __init__(
        self,
        causal_lm: keras_hub.models.CausalLM,
        sampler: BlockSampler,
        feature_network: FeatureNetwork,
        readers: tuple[FrozenReader | None, FrozenReader | None],
        reward: Reward,
        advantage: str,
        objective: Objective,
        critic: Critic | None = None,
        critic_head: CriticHead | None = None,
        rematerialize: bool = False,
        micro_batches: int = 1,
    ) -> None:
        self.causal_lm = causal_lm
        self.sampler = sampler
        self.feature_network = feature_network
        self.feature_reader, self.reference_reader = readers
        self.reward = reward
        self.advantage = advantage
        self.objective = objective
        self.critic = critic
        self.critic_head = critic_head
        self.micro_batches = micro_batches
        self.policy = routed_backbone(causal_lm.backbone, rematerialize)
        # Raises now where they are wanted of a model that cannot know them. Asked
        # again when needed: the tokenizer of a model that is being loaded is empty.
        _ = self.stop_token_ids

    def __call__(
        self, documents: Documents, seed: Seed, experience: Experience | None = None
    ) -> StepOutputs:
        """From documents to the terms of the loss.

        Args:
            documents: `Documents`.
            seed: int or `keras.random.SeedGenerator`, decides the rollouts.
            experience: `Experience` that an earlier update of these documents
                learned from, or `None` to sample.

        Returns:
            `StepOutputs`.
        """
        # The policy reads every document once, with gradient.
        state = self.read(documents)
        document_scores = self.score_documents(
            state, documents, with_gradient=self.objective.trains_documents
        )
        if not self.objective.needs_rollouts:
            document_scores = all_rows(document_scores)
            terms = self.objective.terms(document_scores)
            return StepOutputs(terms, document_scores)

        # Every block of every sample continues it; rollouts are embedded and rewarded.
        if experience is None:
            experience = self.explore(documents, state, seed)

        # The policy scores what it sampled against the same reading, with gradient.
        scores = self.score_rollouts(state, experience.rollouts)
        critic_terms = {} if self.critic is None else self.criticise(experience)

        # What replicas found of their rows: all means are those of the whole batch.
        document_scores, experience, scores = all_rows(
            (document_scores, experience.without_features(), scores)
        )

        # L = policy_weight L_PG + ce_weight L_CE + kl_weight L_KL - entropy_weight H
        terms = self.objective.terms(document_scores, experience, scores)
        terms = terms._replace(**critic_terms)
        return StepOutputs(terms, document_scores, experience, scores)

    def read(self, documents: Documents) -> DocumentState:
        """What the policy knows of documents, shared by all that continues them.

        Args:
            documents: `Documents`.

        Returns:
            `DocumentState`.
        """
        return read_document(self.policy, documents)

    def explore(
        self, documents: Documents, state: DocumentState, seed: Seed
    ) -> Experience:
        """Rollouts, their features, rewards and advantages, without gradient.

        Args:
            documents: `Documents`.
            state: `DocumentState` of the policy.
            seed: int or `keras.random.SeedGenerator`.

        Returns:
            `Experience`.
        """
        with no_gradient():
            numbers = draw_numbers(self.sampler, documents, seed)
            return self.experience_of(self.sample(documents, state, numbers))

    def experience_of(self, rollouts: Rollouts) -> Experience:
        """Rollouts with what the frozen networks and the reward say of them.

        Args:
            rollouts: `Rollouts`.

        Returns:
            `Experience`, without gradient.
        """
        with no_gradient():
            frozen = self.read_frozen(rollouts)
            return Experience(rollouts, frozen, self.judge(rollouts, frozen))

    def explore_first(self, documents: Documents, seed: Seed) -> Experience:
        """`explore`, for several updates that learn from the same rollouts.

        Returns:
            `Experience` with `old_log_prob`, all of it in tensors.
        """
        with no_gradient():
            state = self.read(documents)
            experience = self.explore(documents, state, seed)
            scores = self.score_rollouts(state, experience.rollouts)
        return experience._replace(
            rollouts=experience.rollouts._replace(
                blocks=experience.rollouts.blocks.as_tensors()
            ),
            old_log_prob=scores.log_prob,
        )

    def sample(
        self,
        documents: Documents,
        state: DocumentState,
        numbers: tuple[Tensor, Tensor | None],
    ) -> Rollouts:
        """Strided block-parallel sampling: all blocks and samples, token by token.

        Args:
            documents: `Documents`.
            state: `DocumentState` of the policy.
            numbers: what `draw_numbers` returned.

        Returns:
            `Rollouts`.
        """
        uniform, anchor_uniform = numbers
        blocks = self.blocks(documents, anchor_uniform)
        sample: Callable[..., Any] = functools.partial(self.sampler, self.policy)
        head, state = output_head(self.causal_lm.backbone), stop_gradient(state)
        if self.sampler.draws_tokens:
            token_ids, log_prob = self._in_groups(
                lambda samples, shared: sample(*shared, blocks, samples["uniform"]),
                {"uniform": uniform},
                (head, state),
            )
        else:
            token_ids, log_prob = sample(head, state, blocks, uniform)
        stops = self.stop_token_ids
        alive, has_ended = before_stop(token_ids, stops), ended(token_ids, stops)
        if stops:
            # What comes after the end says nothing more than that.
            token_ids = ops.where(alive, token_ids, stops[0])
        return Rollouts(documents, blocks, token_ids, alive, log_prob, has_ended)

    def replayed(
        self, documents: Documents, token_ids: Tensor, anchors: Tensor | None = None
    ) -> Rollouts:
        """Given tokens as `Rollouts`, where the sampler put them.

        Args:
            documents: `Documents`.
            token_ids: int32 tensor `[B, n, K, G]`.
            anchors: int32 tensor `[B, K]`, where `sample` put its blocks, -1 for
                dead ones; `None` where the documents alone decide that.
        """
        if anchors is None:
            blocks = self.blocks(documents)
        else:
            blocks = self.sampler.blocks_at(
                documents, anchors, stops=bool(self.stop_token_ids)
            )
        stops = self.stop_token_ids
        return Rollouts(
            documents,
            blocks,
            token_ids,
            before_stop(token_ids, stops),
            ended=ended(token_ids, stops),
        )

    def read_frozen(
        self, rollouts: Rollouts, with_reference: bool = True
    ) -> FrozenReading:
        """Features of rollouts and truth, and the reference's log-probabilities.

        Args:
            rollouts: `Rollouts`.
            with_reference: bool, whether the reference is asked, if there is one.

        Returns:
            `FrozenReading`.
        """
        features = self.feature_reader
        reference = self.reference_reader if with_reference else None
        # Where both are one copy it reads once.
        readers = list({id(r): r for r in (features, reference) if r}.values())
        states = [reader.read(rollouts.documents) for reader in readers]
        kernel = None if reference is None else reference.reference_head().kernel

        def read(samples: dict[str, Tensor], shared: Any) -> dict[str, Tensor]:
            states, kernel = shared
            token_ids, blocks = samples["token_ids"], rollouts.blocks
            outputs = [
                reader.continued(state, token_ids, blocks)
                for reader, state in zip(readers, states)
            ]
            said = {}
            if features is not None:
                said["generated"] = self.feature_network.generated(
                    features.taps(outputs[0]), samples["counted"], samples["alive"]
                )
            if reference is not None:
                said["reference_log_prob"], _ = self._log_prob(
                    reference.reference_hidden(states[-1], outputs[-1], blocks),
                    token_ids,
                    self.sampler.scoring_temperature,
                    reference.reference_head()._replace(kernel=kernel),
                )
            return said

        samples = {
            "token_ids": rollouts.token_ids,
            "counted": rollouts.counted,
            "alive": rollouts.alive,
        }
        said = self._in_groups(read, samples, (states, kernel)) if readers else {}
        if features is not None:
            said["target"] = self.feature_network.target(
                features.taps(states[0].outputs), rollouts.blocks
            )
        return FrozenReading(**said)

    def judge(self, rollouts: Rollouts, frozen: FrozenReading) -> Judged:
        """Rewards and advantages, 0 where nothing counts.

        Args:
            rollouts: `Rollouts`.
            frozen: `FrozenReading`.

        Returns:
            `Judged`.
        """
        return judged(self.reward, self.advantage, rollouts, frozen)

    def score_rollouts(self, state: DocumentState, rollouts: Rollouts) -> RolloutScores:
        """Log-probability and entropy of generated tokens, with gradient.

        A token is predicted from the position before it: the first of a block
        from the document, so the last generated token is never read.

        Args:
            state: `DocumentState` of the policy.
            rollouts: `Rollouts`.

        Returns:
            `RolloutScores`.
        """
        head = output_head(self.causal_lm.backbone)
        blocks = rollouts.blocks

        def score(samples: dict[str, Tensor], shared: Any) -> tuple[Tensor, ...]:
            state, kernel = shared
            token_ids = samples["token_ids"]
            before = take_tokens(state.outputs, blocks.anchors - 1)
            count, steps = token_ids.shape[1], token_ids.shape[-1]
            hidden = ops.repeat(before[:, None, :, None, :], count, axis=1)
            if steps > 1:
                read = read_blocks(self.policy, state, token_ids[..., :-1], blocks)
                hidden = ops.concatenate([hidden, read], axis=-2)
            temperature = self.sampler.scoring_temperature
            return self._log_prob(
                hidden, token_ids, temperature, head._replace(kernel=kernel)
            )

        samples = {"token_ids": rollouts.token_ids}
        return RolloutScores(*self._in_groups(score, samples, (state, head.kernel)))

    def score_documents(
        self, state: DocumentState, documents: Documents, with_gradient: bool = True
    ) -> DocumentScores:
        """Log-probability of every next token, temperature 1.

        Args:
            state: `DocumentState` of the policy.
            documents: `Documents`.
            with_gradient: bool.

        Returns:
            `DocumentScores`.
        """
        labels = documents.token_ids[:, 1:]
        if with_gradient:
            log_prob, _ = self._log_prob(state.outputs[:, :-1], labels, 1.0)
        else:
            with no_gradient():
                hidden = stop_gradient(state).outputs[:, :-1]
                log_prob, _ = self._log_prob(hidden, labels, 1.0)
        mask = ops.cast(documents.next_token_mask, "float32")
        return DocumentScores(log_prob, mask)

    def criticise(self, experience: Experience) -> dict[str, Tensor]:
        """The critic's terms of the loss: can it tell rollouts from the truth?

        Args:
            experience: `Experience`.

        Returns:
            dict of float32 scalars, see `Critic.terms`.
        """
        critic, head = cast(Critic, self.critic), cast(CriticHead, self.critic_head)
        frozen = experience.frozen
        if critic.train_features:
            # Once more, with gradient to the network that features come from.
            frozen = self.read_frozen(experience.rollouts, with_reference=False)
        logits = head(frozen.target), head(frozen.generated)
        return critic.terms(*all_rows((*logits, experience.judged.mask)))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a rollout, a tuple of ints."""
        if not self.sampler.has_stop_tokens:
            return ()
        given = self.sampler.stop_token_ids
        return end_token_ids(self.causal_lm) if isinstance(given, str) else given or ()

    def blocks(
        self, documents: Documents, anchor_uniform: Tensor | None = None
    ) -> Blocks:
        """The `Blocks` of documents."""
        return self.sampler.blocks(
            documents, anchor_uniform, stops=bool(self.stop_token_ids)
        )

    def check_positions(self, length: int) -> None:
        """Raises a `ValueError` if rollouts could leave the learned positions.

        Args:
            length: int, tokens per row.
        """
        limit = maximum_length(self.causal_lm)
        runs_over = self.stop_token_ids or self.sampler.anchors == "answer_start"
        reached = length + self.sampler.rollout_length
        if limit is not None and runs_over and reached > limit:
            raise ValueError(
                f"Expected rows and rollouts of at most {limit} tokens together, the "
                "model's learned positions, because rollouts may run on where a row "
                f"ends. Received: {length} + {self.sampler.rollout_length}. Use "
                "shorter rows or a smaller `rollout_length`."
            )

    def _log_prob(
        self,
        hidden: Tensor,
        labels: Tensor,
        temperature: float,
        head: OutputHead | None = None,
    ) -> tuple[Tensor, ...]:
        head = head or output_head(self.causal_lm.backbone)
        scores = linear_logprob(
            ops.reshape(hidden, (-1, hidden.shape[-1])),
            head.kernel,
            ops.reshape(labels, (-1,)),
            temperature=temperature,
            soft_cap=head.soft_cap,
        )
        return tuple(ops.reshape(score, labels.shape) for score in scores)

    def _in_groups(
        self,
        function: Callable[[Any, Any], Any],
        samples: dict[str, Tensor],
        shared: Any,
    ) -> Any:
        return in_groups(function, self.micro_batches, samples, shared)


def judged(
    reward: Reward, advantage: str, rollouts: Rollouts, frozen: FrozenReading
) -> Judged:
    """What a reward says of rollouts, 0 where nothing counts.

    Args:
        reward: `Reward`.
        advantage: name of the advantage estimator.
        rollouts: `Rollouts`.
        frozen: `FrozenReading`.

    Returns:
        `Judged`.
    """
    rewards = reward.judge(frozen.generated, frozen.target, rollouts, advantage)
    return _where_counted(rewards, reward.block_measures, rollouts)


def _where_counted(
    rewards: dict[str, Tensor], block_measures: tuple[str, ...], rollouts: Rollouts
) -> Judged:
    """What a reward returned as `Judged`, with 0 in what does not count."""
    shape = rewards["reward"].shape
    if len(shape) == 4:
        counts = ops.logical_and(
            rollouts.counted, rollouts.blocks.true_counted[:, None]
        )
    else:
        counts = ops.broadcast_to(rollouts.blocks.live[:, None], shape)
    measured = ops.any(counts, axis=1)

    def keep(name: str, mask: Tensor) -> Tensor:
        value = rewards[name]
        return ops.where(mask, value, ops.zeros_like(value))

    names = ("alignment", "diversity", "reward", "advantage")
    return Judged(
        **{name: keep(name, counts) for name in names},
        mask=ops.cast(counts, "float32"),
        measures={name: keep(name, measured) for name in block_measures},
    )
