"""The objective once more, from whole sequences through the plain network.

Every block of every sample is a causal sequence of its own, every document a row
of its own; losses are written down as in the paper. Slow, and shares nothing with
what it checks but the weights.
"""

import numpy as np
from keras import ops


class Plain:
    """Rollouts and documents of one batch as plain causal sequences.

    Args:
        token_ids: int array `[B, T]`.
        rollouts: int array `[B, n, K, G]`.
        anchors: int array `[B, K]`, -1 for dead blocks.
        starts: int array `[B, T]`, first token of each token's document.
        temperature: float.
    """

    def __init__(self, token_ids, rollouts, anchors, temperature, starts=None):
        self.token_ids = token_ids
        self.rollouts = rollouts
        self.starts = np.zeros_like(token_ids) if starts is None else starts
        self.temperature = temperature
        self.shape = rollouts.shape
        batch, samples, blocks, steps = self.shape
        length = token_ids.shape[1] + steps
        self.rows = np.zeros((batch, samples, blocks, length), dtype="int32")
        # Where each generated token's logits stand in its row.
        self.places = np.zeros((batch, samples, blocks, steps), dtype="int32")
        for b, j, k in np.ndindex(batch, samples, blocks):
            anchor = max(anchors[b, k], 1)
            first = self.starts[b, anchor - 1]
            seen = anchor - first
            self.rows[b, j, k, :seen] = token_ids[b, first:anchor]
            self.rows[b, j, k, seen : seen + steps] = rollouts[b, j, k]
            self.places[b, j, k] = seen - 1 + np.arange(steps)

    def log_softmax(self, causal_lm):
        """Log-probabilities of every token at each place, `[B, n, K, G, V]`."""
        rows = self.rows.reshape(-1, self.rows.shape[-1])
        logits = _logits(causal_lm, rows)
        places = self.places.reshape(len(rows), -1, 1)
        places = np.broadcast_to(places, (*places.shape[:2], logits.shape[-1]))
        logits = ops.take_along_axis(logits, ops.convert_to_tensor(places), axis=1)
        logits = ops.reshape(logits, (*self.shape, logits.shape[-1]))
        return ops.log_softmax(logits / self.temperature, axis=-1)

    def log_prob_and_entropy(self, causal_lm):
        """Of each generated token, `[B, n, K, G]`."""
        log_p = self.log_softmax(causal_lm)
        tokens = ops.convert_to_tensor(self.rollouts[..., None])
        chosen = ops.take_along_axis(log_p, tokens, axis=-1)
        entropy = -ops.sum(ops.exp(log_p) * log_p, axis=-1)
        return chosen[..., 0], entropy

    def cross_entropy(self, causal_lm, counted):
        """Mean over the next tokens `[B, T - 1]` that count."""
        total = 0.0
        for row, starts, mask in zip(self.token_ids, self.starts, counted):
            for first in np.unique(starts):
                inside = np.flatnonzero(starts == first)
                text = row[inside[0] : inside[-1] + 1][None]
                log_p = ops.log_softmax(_logits(causal_lm, text), axis=-1)
                if text.shape[1] == 1:
                    continue
                following = ops.convert_to_tensor(text[:, 1:, None])
                chosen = ops.take_along_axis(log_p[:, :-1], following, axis=-1)
                weight = mask[inside[0] : inside[-1]].astype("float32")
                total = total - ops.sum(chosen[0, :, 0] * ops.convert_to_tensor(weight))
        return total / counted.sum()


def _logits(causal_lm, token_ids):
    token_ids = ops.convert_to_tensor(token_ids)
    x = {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)}
    return causal_lm(x, training=False)
