"""White-box methods of `EBFTModel`, for notebooks, tests and analysis."""

import numpy as np
from keras import ops

from keras_ebft.backend.runtime import compiled, no_gradient
from keras_ebft.layout.documents import read_documents
from keras_ebft.layout.draws import draw_numbers
from keras_ebft.networks.prefix_cache import read_document
from keras_ebft.training.token_rows import to_token_rows

REWARD_NAMES = ("alignment", "diversity", "reward", "advantage")


class Inspection:
    """Each part of a step on its own. Every method reads the documents anew.

    `x` is documents in memory, of any form `fit` accepts. `rollouts` is what
    `rollout` returned, or an int array `[B, n, K, G]`. All raise what `fit`
    raises for unusable documents, and `ValueError` for rollouts of a wrong shape
    or, with random anchors, without their anchors.
    """

    def rollout(self, x, seed=None):
        """Samples rollouts.

        Args:
            x: documents.
            seed: int, or `None` for numbers that differ from call to call.

        Returns:
            dict of `token_ids` int32 and `log_prob` float32 `[B, n, K, G]`, in
            nats at the sampling temperature; `mask` bool `[B, n, K, G]`, tokens
            that count; and `anchors` int32 `[B, K]`, -1 for dead blocks.

        Example:
        ```python
        rollouts = model.rollout(texts, seed=0)
        model.rewards(texts, rollouts)["reward"]
        ```
        """
        batch = self._in_memory(x)
        seed = self._inspection_seed if seed is None else seed
        with no_gradient():
            uniforms = draw_numbers(self.sampler, read_documents(batch), seed)
            return self._compiled["rollout"](batch, uniforms)

    def score(self, x, rollouts):
        """Log-probabilities of rollouts and documents, with gradient.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            dict of `log_prob` and `entropy` `[B, n, K, G]`, at the sampling
            temperature, and `document_log_prob` `[B, T - 1]`, at temperature 1;
            float32, nats.
        """
        scores = self._compiled["score"](*self._with_rollouts(x, rollouts))
        return {
            name: scores[name] for name in ("log_prob", "entropy", "document_log_prob")
        }

    def features(self, x, rollouts):
        """Features of rollouts and of the true continuations.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            `(generated, target)`: float32 `[B, n, K, F, D]` and `[B, K, F, D]`;
            with `"token"` pooling `[B, n, K, G, F, D]` and `[B, K, G, F, D]`.
        """
        self._refuse_without_rollouts()
        with no_gradient():
            return self._compiled["features"](*self._with_rollouts(x, rollouts))

    def rewards(self, x, rollouts):
        """Rewards and advantages of rollouts.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            dict of float32 `[B, n, K]`: `alignment`, `diversity`, `reward` and
            `advantage`, 0 in dead blocks; `[B, n, K, G]` with `"token"` pooling.
        """
        self._refuse_without_rollouts()
        rewards = self._judge(*self._with_rollouts(x, rollouts))
        return {name: rewards[name] for name in REWARD_NAMES}

    @property
    def losses(self):
        """Layer losses (a list); called with `(x, rollouts)`, a dict of scalars."""
        return CallableLosses(super().losses, self._losses_of)

    def _losses_of(self, x, rollouts):
        if self.objective.needs_rollouts:
            batch, rollout_ids = self._with_rollouts(x, rollouts)
            outputs = {
                **self._compiled["score"](batch, rollout_ids),
                **self._judge(batch, rollout_ids),
            }
        else:
            outputs = self._compiled["read_only"](self._in_memory(x))
        terms = self.objective.terms(outputs)
        return {**terms, "loss": self.objective.loss(terms, self._training_steps)}

    def _judge(self, batch, rollout_ids):
        with no_gradient():
            return self._compiled["judge"](batch, rollout_ids)

    def _refuse_without_rollouts(self):
        if not self.objective.needs_rollouts:
            raise ValueError(
                "Expected a model that learns from rollouts, and so has a feature "
                "network. Received: one whose only weight is `ce_weight`. Build an "
                "EBFTModel with `policy_weight` on the same CausalLM."
            )

    def _in_memory(self, x):
        rows = to_token_rows(x, self.causal_lm)
        self._check_rows(rows)
        return {name: ops.convert_to_tensor(value) for name, value in rows.items()}

    def _with_rollouts(self, x, rollouts):
        batch = self._in_memory(x)
        given = rollouts if isinstance(rollouts, dict) else {"token_ids": rollouts}
        if "anchors" in given:
            batch["anchors"] = ops.convert_to_tensor(given["anchors"], dtype="int32")
        if self.sampler.draws_anchors and "anchors" not in batch:
            raise ValueError(
                "Expected the anchors of rollouts that stand at random places. "
                "Received: token ids alone. Pass what `rollout` returned."
            )
        shape = tuple(np.shape(given["token_ids"]))
        documents = batch["token_ids"].shape[0]
        blocks = self.sampler.num_blocks(read_documents(batch))
        fits = (documents, blocks, self.sampler.rollout_length)
        if len(shape) != 4 or (shape[0], *shape[2:]) != fits:
            raise ValueError(
                "Expected rollouts of shape [B, n, K, G] = "
                f"[{documents}, n, {fits[1]}, {fits[2]}] for these documents and "
                f"this sampler. Received: shape {shape}."
            )
        return batch, ops.convert_to_tensor(given["token_ids"], dtype="int32")


def compile_parts(step, variables):
    """The parts of a step as functions of tensors, compiled where it pays.

    Args:
        step: `EBFTStep`.
        variables: function without arguments that returns all variables.

    Returns:
        dict of functions.
    """

    def rollout(batch, uniforms):
        documents = read_documents(batch)
        uniform, anchor_uniform = uniforms
        state = read_document(step.policy, documents)
        blocks = step.blocks(documents, anchor_uniform)
        rollout_ids, log_prob = step.rollout(state, blocks, uniform)
        if log_prob is None:
            log_prob = step.score_rollouts(state, blocks, rollout_ids)["log_prob"]
        return {
            "token_ids": rollout_ids,
            "log_prob": log_prob,
            "mask": step.token_mask(blocks, rollout_ids),
            "anchors": step.absolute_anchors(blocks),
        }

    def score(batch, rollout_ids):
        documents = read_documents(batch)
        state = read_document(step.policy, documents)
        return {
            **step.score_rollouts(state, step.blocks(documents), rollout_ids),
            **step.score_documents(state, documents, train=True),
        }

    def features(batch, rollout_ids):
        documents = read_documents(batch)
        return step.features(documents, step.blocks(documents), rollout_ids)

    def judge(batch, rollout_ids):
        documents = read_documents(batch)
        return step.judge(documents, step.blocks(documents), rollout_ids)

    def read_only(batch):
        return step.read_only(batch)

    parts = (rollout, score, features, judge, read_only)
    return {part.__name__: compiled(part, variables) for part in parts}


class CallableLosses(list):
    """Keras' list of layer losses that, called, gives the losses of rollouts.

    `model.losses` belongs to Keras, which reads a list from it, and is the
    natural name for the losses of given rollouts: it serves both.
    """

    def __init__(self, layer_losses, of_rollouts):
        super().__init__(layer_losses)
        self._of_rollouts = of_rollouts

    def __call__(self, x, rollouts):
        """Losses of given rollouts.

        Args:
            x: documents in memory.
            rollouts: what `rollout` returned, or int array `[B, n, K, G]`; not
                looked at by a model that learns from documents alone.

        Returns:
            dict of float32 scalars: the terms, such as `policy_loss`, `ce_loss`
            and `entropy`, and their weighted sum `loss`.
        """
        return self._of_rollouts(x, rollouts)
