"""The algorithm of one step, on tensors: documents in, everything measured out."""

import functools

from keras import ops

from keras_ebft.backend.runtime import no_gradient
from keras_ebft.backend.sample_groups import in_groups
from keras_ebft.kernels import linear_logprob
from keras_ebft.layout.documents import read_documents, take_tokens
from keras_ebft.layout.draws import draw_numbers
from keras_ebft.networks import (
    end_token_ids,
    maximum_length,
    output_head,
    routed_backbone,
)
from keras_ebft.networks.prefix_cache import read_blocks, read_document, stop_gradient
from keras_ebft.records import RolloutBatch, Rollouts
from keras_ebft.samplers import before_stop


class EBFTStep:
    """What happens to a batch of documents between input and loss.

    Args:
        causal_lm: supported `keras_hub.models.CausalLM`, the policy.
        sampler: `BlockSampler`.
        networks: `FrozenNetworks`.
        reward: `Reward`.
        estimator: name of the advantage estimator.
        critic: `Critic` or `None`.
        rematerialize: bool, whether the policy's decoder layers run again in the
            backward pass.
        micro_batches: int, groups of samples that are read one after another.
    """

    def __init__(
        self,
        causal_lm,
        sampler,
        networks,
        reward,
        estimator,
        critic=None,
        rematerialize=False,
        micro_batches=1,
    ):
        self.causal_lm = causal_lm
        self.sampler = sampler
        self.networks = networks
        self.reward = reward
        self.estimator = estimator
        self.critic = critic
        self.micro_batches = micro_batches
        self.policy = routed_backbone(causal_lm.backbone, rematerialize)
        self.stop_token_ids = _resolve_stop_token_ids(sampler, causal_lm)

    def __call__(self, inputs, seed, train_documents):
        """Samples, rewards and scores, with one reading of the documents.

        Args:
            inputs: dict of tensors; see `EBFTModel.call`.
            seed: int or `keras.random.SeedGenerator`.
            train_documents: bool, whether `document_log_prob` has a gradient.

        Returns:
            dict; see `EBFTModel.call`.
        """
        documents = read_documents(inputs)
        state = read_document(self.policy, documents)
        with no_gradient():
            blocks, rollout_ids = self.sample(documents, state, seed)
            rewarded = self.judge(documents, blocks, rollout_ids)
        return {
            "token_ids": rollout_ids,
            **self.score_rollouts(state, blocks, rollout_ids),
            **rewarded,
            **self.learning_features(documents, blocks, rollout_ids),
            **self.score_documents(state, documents, train_documents),
        }

    def collect(self, inputs, seed):
        """Rollouts, rewards and the log-probabilities they were sampled with.

        For several updates per rollout: what `score` needs besides `inputs`.
        """
        documents = read_documents(inputs)
        with no_gradient():
            state = read_document(self.policy, documents)
            blocks, rollout_ids = self.sample(documents, state, seed)
            scores = self.score_rollouts(state, blocks, rollout_ids)
            return {
                "token_ids": rollout_ids,
                "anchors": self.absolute_anchors(blocks),
                "old_log_prob": scores["log_prob"],
                **self.judge(documents, blocks, rollout_ids),
            }

    def score(self, inputs, collected, train_documents):
        """Scores what `collect` returned under the policy as it is now."""
        documents = read_documents({**inputs, "anchors": collected["anchors"]})
        state = read_document(self.policy, documents)
        blocks = self.blocks(documents)
        return {
            **collected,
            **self.score_rollouts(state, blocks, collected["token_ids"]),
            **self.learning_features(documents, blocks, collected["token_ids"]),
            **self.score_documents(state, documents, train_documents),
        }

    def read_only(self, inputs):
        """The documents' scores alone, where nothing is learned from rollouts."""
        documents = read_documents(inputs)
        state = read_document(self.policy, documents)
        return self.score_documents(state, documents, train=True)

    def sample(self, documents, state, seed):
        """`(blocks, rollout_ids)`: blocks of documents, and what continues them."""
        uniform, anchor_uniform = draw_numbers(self.sampler, documents, seed)
        blocks = self.blocks(documents, anchor_uniform)
        return blocks, self.rollout(state, blocks, uniform).token_ids

    def check_positions(self, length):
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

    def blocks(self, documents, anchor_uniform=None):
        """The `Blocks` of documents."""
        return self.sampler.blocks(
            documents, anchor_uniform, stops=bool(self.stop_token_ids)
        )

    @staticmethod
    def absolute_anchors(blocks):
        """Anchors as an int32 tensor `[B, K]`, -1 for dead blocks."""
        anchors = ops.cast(ops.convert_to_tensor(blocks.anchors), "int32")
        return ops.where(blocks.live, anchors, -1)

    def rollout(self, state, blocks, uniform):
        """`Rollouts` that continue what the policy has read."""
        head = output_head(self.causal_lm.backbone)
        state = stop_gradient(state)
        sample = functools.partial(self.sampler, self.policy)
        if self.sampler.draws_tokens:
            rollouts = self._in_groups(
                lambda samples, shared: sample(*shared, blocks, samples["uniform"]),
                {"uniform": uniform},
                (head, state),
            )
        else:
            rollouts = sample(head, state, blocks, uniform)
        if not self.stop_token_ids:
            return rollouts
        alive = before_stop(rollouts.token_ids, self.stop_token_ids)
        # What comes after the end says nothing more than that.
        stopped = ops.where(alive, rollouts.token_ids, self.stop_token_ids[0])
        return Rollouts(stopped, rollouts.log_prob)

    def token_mask(self, blocks, rollout_ids):
        """Generated tokens that count, bool `[B, n, K, G]`."""
        alive = before_stop(rollout_ids, self.stop_token_ids)
        return ops.logical_and(blocks.counted[:, None], alive)

    def judge(self, documents, blocks, rollout_ids):
        """Rewards, advantages and masks of rollouts, 0 where nothing counts."""
        alive = before_stop(rollout_ids, self.stop_token_ids)
        token_mask = self.token_mask(blocks, rollout_ids)
        generated, target, ref_log_prob = self.embed(documents, blocks, rollout_ids)
        batch = RolloutBatch(documents, blocks, rollout_ids, alive)
        rewards = self.reward.judge(generated, target, batch, self.estimator)
        judged = _where_live(rewards, blocks, token_mask)
        judged["token_mask"] = ops.cast(token_mask, "float32")
        if self.critic is not None:
            judged["features"], judged["true_features"] = generated, target
        if blocks.starts is not None:
            judged["block_starts"] = blocks.starts
        if ref_log_prob is not None:
            judged["ref_log_prob"] = ref_log_prob
        return judged

    def embed(self, documents, blocks, rollout_ids, with_reference=True):
        """What the frozen networks say of documents and rollouts.

        Returns:
            `(generated, target, ref_log_prob)`: features of rollouts and of true
            continuations, and log-probabilities `[B, n, K, G]` under the reference;
            `None` for what is not needed.
        """
        networks = self.networks
        with_reference = with_reference and networks.has_reference
        states = networks.read(documents)

        def embed(samples, shared):
            states, kernel = shared
            outputs = networks.outputs(states, samples["token_ids"], blocks)
            masks = samples["token_mask"], samples["alive"]
            found = {}
            if self.reward.needs_features:
                found["features"] = networks.features(outputs, *masks)
            if with_reference:
                found["log_prob"], _ = self._log_prob(
                    networks.reference_hidden(outputs, blocks),
                    samples["token_ids"],
                    self.sampler.scoring_temperature,
                    networks.reference_head()._replace(kernel=kernel),
                )
            return found

        samples = {
            "token_ids": rollout_ids,
            "token_mask": self.token_mask(blocks, rollout_ids),
            "alive": before_stop(rollout_ids, self.stop_token_ids),
        }
        kernel = networks.reference_head().kernel if with_reference else None
        found = self._in_groups(embed, samples, (states, kernel)) if states else {}
        target = None
        if self.reward.needs_features:
            target = networks.true_features(states, blocks)
        return found.get("features"), target, found.get("log_prob")

    def features(self, documents, blocks, rollout_ids):
        """`(generated, target)` features of rollouts and true continuations."""
        return self.embed(documents, blocks, rollout_ids, with_reference=False)[:2]

    def learning_features(self, documents, blocks, rollout_ids):
        """Features once more, with gradient, where the critic trains them."""
        if self.critic is None or not self.critic.train_features:
            return {}
        generated, target = self.features(documents, blocks, rollout_ids)
        return {"features": generated, "true_features": target}

    def score_rollouts(self, state, blocks, rollout_ids):
        """Log-probability and entropy `[B, n, K, G]` at the sampling temperature.

        A token is predicted from the position before it: the first of a block
        from the document, so the last generated token is never read.
        """
        head = output_head(self.causal_lm.backbone)

        def score(samples, shared):
            state, kernel = shared
            rollout_ids = samples["token_ids"]
            before = take_tokens(state.outputs, blocks.anchors - 1)
            count, steps = rollout_ids.shape[1], rollout_ids.shape[-1]
            hidden = ops.repeat(before[:, None, :, None, :], count, axis=1)
            if steps > 1:
                read = read_blocks(self.policy, state, rollout_ids[..., :-1], blocks)
                hidden = ops.concatenate([hidden, read], axis=-2)
            log_prob, entropy = self._log_prob(
                hidden,
                rollout_ids,
                self.sampler.scoring_temperature,
                head._replace(kernel=kernel),
            )
            return {"log_prob": log_prob, "entropy": entropy}

        return self._in_groups(score, {"token_ids": rollout_ids}, (state, head.kernel))

    def score_documents(self, state, documents, train):
        """Log-probability `[B, T - 1]` of every next token, temperature 1."""
        labels = documents.token_ids[:, 1:]
        if train:
            log_prob, _ = self._log_prob(state.outputs[:, :-1], labels, 1.0)
        else:
            with no_gradient():
                outputs = stop_gradient(state).outputs
                log_prob, _ = self._log_prob(outputs[:, :-1], labels, 1.0)
        return {
            "document_log_prob": log_prob,
            "document_mask": ops.cast(documents.next_token_mask, "float32"),
        }

    def _log_prob(self, hidden, labels, temperature, head=None):
        head = head or output_head(self.causal_lm.backbone)
        scores = linear_logprob(
            ops.reshape(hidden, (-1, hidden.shape[-1])),
            head.kernel,
            ops.reshape(labels, (-1,)),
            temperature=temperature,
            soft_cap=head.soft_cap,
        )
        return tuple(ops.reshape(score, labels.shape) for score in scores)

    def _in_groups(self, function, samples, shared):
        return in_groups(function, self.micro_batches, samples, shared)


def _where_live(rewards, blocks, token_mask):
    """Rewards with 0 in what does not count, and the mask that says so."""
    shape = rewards["reward"].shape
    if len(shape) == 4:
        counts = ops.logical_and(token_mask, blocks.true_counted[:, None])
    else:
        counts = ops.broadcast_to(blocks.live[:, None], shape)
    measured = ops.any(counts, axis=1)

    def keep(value):
        # What has no sample axis is a measure of the block.
        mask = counts if len(value.shape) == len(shape) else measured
        return ops.where(mask, value, ops.zeros_like(value))

    kept = {name: keep(value) for name, value in rewards.items()}
    return {**kept, "reward_mask": ops.cast(counts, "float32")}


def _resolve_stop_token_ids(sampler, causal_lm):
    if sampler.stop_token_ids != "auto":
        return sampler.stop_token_ids or ()
    if sampler.anchors == "answer_start":
        return end_token_ids(causal_lm)
    return ()
