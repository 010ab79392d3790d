"""The algorithm of one step, on tensors: documents in, everything measured out."""

import keras
from keras import ops

from keras_ebft import bridge
from keras_ebft.kernels import linear_logprob
from keras_ebft.kernels.backend import no_gradient
from keras_ebft.prefix_cache import read_blocks, read_document, stop_gradient


class EBFTStep:
    """What happens to a batch of documents between input and loss.

    Args:
        causal_lm: supported `keras_hub.models.CausalLM`, the policy.
        sampler: `BlockSampler`.
        feature_network: `FeatureNetwork`; frozen here.
        reward: `FeatureMatchingReward`.
        estimator: name of the advantage estimator.
    """

    def __init__(self, causal_lm, sampler, feature_network, reward, estimator):
        self.causal_lm = causal_lm
        self.sampler = sampler
        self.feature_network = feature_network
        self.reward = reward
        self.estimator = estimator
        self.policy = bridge.routed_backbone(causal_lm.backbone)
        self.frozen = feature_network.freeze(causal_lm.backbone)

    def __call__(self, token_ids, padding_mask, seed, train_documents):
        """Runs the step up to the loss.

        Args:
            token_ids: int32 tensor `[B, T]`.
            padding_mask: bool tensor `[B, T]`, padded on the right.
            seed: int or `keras.random.SeedGenerator`.
            train_documents: bool, whether `document_log_prob` has a gradient.

        Returns:
            dict; see `EBFTModel.call`.
        """
        geometry = self.sampler.geometry(token_ids.shape[1])
        document = read_document(self.policy, token_ids)
        with no_gradient():
            uniform = self.draw_uniform(token_ids, seed)
            rollouts = self.rollout(document, geometry, uniform)
            features = self.features(token_ids, rollouts.token_ids, geometry)
            rewards = self.rewards(features, padding_mask, geometry)
            if not train_documents:
                scores = self.score_document(stop_gradient(document), token_ids)
        if train_documents:
            scores = self.score_document(document, token_ids)
        log_prob, entropy = self.score_rollouts(document, rollouts.token_ids, geometry)
        return {
            "token_ids": rollouts.token_ids,
            "log_prob": log_prob,
            "entropy": entropy,
            **rewards,
            "document_log_prob": scores,
            "document_mask": ops.cast(padding_mask[:, 1:], "float32"),
        }

    def draw_uniform(self, token_ids, seed):
        """All random numbers of a step, `[B, n, K, G]` uniform in [0, 1).

        Drawn at once, because a generator cannot be advanced inside a compiled
        loop.
        """
        batch, length = token_ids.shape
        geometry = self.sampler.geometry(length)
        samples = self.sampler.num_samples
        shape = (batch, samples, geometry.num_blocks, geometry.rollout_length)
        return keras.random.uniform(shape, dtype="float32", seed=seed)

    def rollout(self, document, geometry, uniform):
        """`Rollouts` that continue what the policy has read."""
        head = bridge.output_head(self.causal_lm.backbone)
        document = stop_gradient(document)
        return self.sampler(self.policy, head, document, geometry, uniform)

    def features(self, token_ids, rollout_ids, geometry):
        """`(generated, target)` features of rollouts and true continuations."""
        return self.feature_network(self.frozen, token_ids, rollout_ids, geometry)

    def rewards(self, features, padding_mask, geometry):
        """Rewards, advantages and the mask of live blocks.

        A block is live if its whole window is real text. Dead blocks get 0.
        """
        rewards = self.reward(*features)
        rewards["advantage"] = self.reward.advantages(rewards, self.estimator)
        ends = ops.take(padding_mask, geometry.positions[:, -1], axis=1)
        rewards = {
            name: _where_live(ends if value.ndim == 2 else ends[:, None, :], value)
            for name, value in rewards.items()
        }
        return {**rewards, "block_mask": ops.cast(ends, "float32")}

    def score_rollouts(self, document, rollout_ids, geometry):
        """Log-probability and entropy `[B, n, K, G]` at the sampling temperature.

        A token is predicted from the position before it: the first of a block
        from the document, so the last generated token is never read.
        """
        shape = tuple(rollout_ids.shape)
        before = ops.take(document.outputs, geometry.anchors - 1, axis=1)
        hidden = ops.repeat(before[:, None, :, None, :], shape[1], axis=1)
        if shape[-1] > 1:
            read = read_blocks(
                self.policy, document, rollout_ids[..., :-1], geometry.anchors
            )
            hidden = ops.concatenate([hidden, read], axis=-2)
        scores = self._log_prob(hidden, rollout_ids, self.sampler.temperature)
        return tuple(ops.reshape(score, shape) for score in scores)

    def score_document(self, document, token_ids):
        """Log-probability `[B, T - 1]` of every next token, temperature 1."""
        labels = token_ids[:, 1:]
        log_prob, _ = self._log_prob(document.outputs[:, :-1], labels, 1.0)
        return ops.reshape(log_prob, labels.shape)

    def _log_prob(self, hidden, labels, temperature):
        head = bridge.output_head(self.causal_lm.backbone)
        return linear_logprob(
            ops.reshape(hidden, (-1, hidden.shape[-1])),
            head.kernel,
            ops.reshape(labels, (-1,)),
            temperature=temperature,
            soft_cap=head.soft_cap,
        )


def _where_live(live, values):
    return ops.where(live, values, ops.zeros_like(values))
