"""White-box methods of `EBFTModel`, for notebooks, tests and analysis."""

import numpy as np
from keras import ops

from keras_ebft import metrics
from keras_ebft.kernels.backend import compiled, no_gradient
from keras_ebft.prefix_cache import read_document
from keras_ebft.token_rows import to_token_rows

REWARD_NAMES = ("alignment", "diversity", "reward", "advantage")


class Inspection:
    """Each part of a step on its own. Every method reads the documents anew.

    `x` is documents in memory, of any form `fit` accepts. `rollouts` is what
    `rollout` returned, or an int array `[B, n, K, G]`. All raise what `fit`
    raises for unusable documents, and `ValueError` for rollouts of a wrong shape.
    """

    def rollout(self, x, seed=None):
        """Samples rollouts.

        Args:
            x: documents.
            seed: int, or `None` for numbers that differ from call to call.

        Returns:
            dict of `token_ids` int32 and `log_prob` float32 `[B, n, K, G]`, in
            nats at the sampling temperature.

        Example:
        ```python
        rollouts = model.rollout(texts, seed=0)
        model.rewards(texts, rollouts)["reward"]
        ```
        """
        token_ids = self._in_memory(x)[0]["token_ids"]
        seed = self._inspection_seed if seed is None else seed
        with no_gradient():
            uniform = self._step.draw_uniform(token_ids, seed)
            rollout_ids, log_prob = self._compiled["rollout"](token_ids, uniform)
        return {"token_ids": rollout_ids, "log_prob": log_prob}

    def score(self, x, rollouts):
        """Log-probabilities of rollouts and documents, with gradient.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            dict of `log_prob` `[B, n, K, G]`, at the sampling temperature, and
            `document_log_prob` `[B, T - 1]`, at temperature 1; float32, nats.
        """
        batch, rollout_ids = self._with_rollouts(x, rollouts)
        return self._scores(batch, rollout_ids)

    def features(self, x, rollouts):
        """Features of rollouts and of the true continuations.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            `(generated, target)`: float32 `[B, n, K, F, D]` and `[B, K, F, D]`.
        """
        batch, rollout_ids = self._with_rollouts(x, rollouts)
        with no_gradient():
            return self._compiled["features"](batch["token_ids"], rollout_ids)

    def rewards(self, x, rollouts):
        """Rewards and advantages of rollouts.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            dict of float32 `[B, n, K]`: `alignment`, `diversity`, `reward` and
            `advantage`, 0 in dead blocks.
        """
        rewards = self._rewards(*self._with_rollouts(x, rollouts))
        return {name: rewards[name] for name in REWARD_NAMES}

    def _losses_of(self, x, rollouts):
        batch, rollout_ids = self._with_rollouts(x, rollouts)
        outputs = {
            **self._scores(batch, rollout_ids),
            **self._rewards(batch, rollout_ids),
            "document_mask": ops.cast(batch["padding_mask"][:, 1:], "float32"),
        }
        terms = metrics.loss_terms(outputs)
        return {**terms, "loss": self.compute_loss(y_pred=outputs)}

    def _scores(self, batch, rollout_ids):
        scores = self._compiled["score"](batch["token_ids"], rollout_ids)
        return {"log_prob": scores[0], "document_log_prob": scores[1]}

    def _rewards(self, batch, rollout_ids):
        with no_gradient():
            return self._compiled["rewards"](
                batch["token_ids"], batch["padding_mask"], rollout_ids
            )

    def _in_memory(self, x):
        rows = to_token_rows(x, self.causal_lm)
        geometry = self.sampler.geometry(rows["token_ids"].shape[1])
        rows = {name: ops.convert_to_tensor(value) for name, value in rows.items()}
        return rows, geometry

    def _with_rollouts(self, x, rollouts):
        batch, geometry = self._in_memory(x)
        token_ids = rollouts["token_ids"] if isinstance(rollouts, dict) else rollouts
        shape = tuple(np.shape(token_ids))
        documents = batch["token_ids"].shape[0]
        fits = (documents, geometry.num_blocks, geometry.rollout_length)
        if len(shape) != 4 or (shape[0], *shape[2:]) != fits:
            raise ValueError(
                "Expected rollouts of shape [B, n, K, G] = "
                f"[{documents}, n, {fits[1]}, {fits[2]}] for these documents and "
                f"this sampler. Received: shape {shape}."
            )
        return batch, ops.convert_to_tensor(token_ids, dtype="int32")


def compile_parts(step, variables):
    """The parts of a step as functions of tensors, compiled where it pays.

    Args:
        step: `EBFTStep`.
        variables: function without arguments that returns all variables.

    Returns:
        dict of functions.
    """

    def rollout(token_ids, uniform):
        geometry = step.sampler.geometry(token_ids.shape[1])
        document = read_document(step.policy, token_ids)
        rollout_ids, log_prob = step.rollout(document, geometry, uniform)
        if log_prob is None:
            log_prob, _ = step.score_rollouts(document, rollout_ids, geometry)
        return rollout_ids, log_prob

    def score(token_ids, rollout_ids):
        geometry = step.sampler.geometry(token_ids.shape[1])
        document = read_document(step.policy, token_ids)
        log_prob, _ = step.score_rollouts(document, rollout_ids, geometry)
        return log_prob, step.score_document(document, token_ids)

    def features(token_ids, rollout_ids):
        geometry = step.sampler.geometry(token_ids.shape[1])
        return step.features(token_ids, rollout_ids, geometry)

    def rewards(token_ids, padding_mask, rollout_ids):
        geometry = step.sampler.geometry(token_ids.shape[1])
        found = step.features(token_ids, rollout_ids, geometry)
        return step.rewards(found, padding_mask, geometry)

    parts = (rollout, score, features, rewards)
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
            rollouts: what `rollout` returned, or int array `[B, n, K, G]`.

        Returns:
            dict of float32 scalars: `policy_loss`, `ce_loss`, `loss`.
        """
        return self._of_rollouts(x, rollouts)
