"""`linear_logprob` in tiles, by PyTorch in memory that is used again.

The sums of `chunked`; but where every operation on a tile of logits would fill new
memory there, which the operating system has to hand out, here two tiles are written
over and over.
"""

from typing import Any, NamedTuple

import torch

from keras_ebft.backend.gradients import differentiable, may_have_gradient
from keras_ebft.kernels.linear_logprob import chunked
from keras_ebft.kernels.projection import projection


def linear_logprob_in_place(hidden, head, labels, *, temperature=1.0, soft_cap=None):
    """See `keras_ebft.kernels.linear_logprob`."""
    size = chunked.ROWS, chunked.TOKENS
    call = _Call(temperature, soft_cap, *size, may_have_gradient(head))
    tensors = (hidden, head, labels)
    scores = differentiable(_forward, _backward, call, tensors, 1 + call.trains_head)
    return scores[0], scores[1]


def scaled_logits_in_place(hidden, head, *, temperature=1.0, soft_cap=None):
    """Capped logits over the temperature, float32 `[R, V]`, in memory of their own."""
    logits = projection(hidden, head.t()).float()
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits if temperature == 1.0 else logits.div_(temperature)


class _Call(NamedTuple):
    """A call without its tensors, and the size of a tile."""

    temperature: float
    soft_cap: Any
    rows: int
    tokens: int
    trains_head: bool

    def logits(self, hidden, head):
        """Scaled logits of a tile."""
        return scaled_logits_in_place(
            hidden, head, temperature=self.temperature, soft_cap=self.soft_cap
        )

    def slope(self, logits):
        """Derivative of scaled logits by the plain ones; not in place."""
        if self.soft_cap is None:
            return 1.0 / self.temperature
        tanh = logits * (self.temperature / self.soft_cap)
        return tanh.square_().neg_().add_(1.0).div_(self.temperature)


def _forward(call, hidden, head, labels):
    """Log-probability and entropy `[2, R]`, normaliser `[R]`."""
    found = [
        torch.stack(_score(call, rows, head, row_labels))
        for rows, row_labels in zip(hidden.split(call.rows), labels.split(call.rows))
    ]
    found = torch.cat(found, dim=1)
    return found[:2], found[2]


def _score(call, hidden, head, labels):
    """`(log_prob, entropy, normaliser)` of a tile of rows, `[R]` each."""
    largest = torch.full(labels.shape, float("-inf"))
    total, weighted, chosen = (torch.zeros_like(largest) for _ in range(3))
    memory = torch.empty(len(labels) * min(call.tokens, len(head)))
    for first, tokens in _tiles(head, call.tokens):
        logits = call.logits(hidden, tokens)
        places, found = _in_tile(labels, first, len(tokens))
        label_logit = logits.gather(1, places[:, None])[:, 0]
        chosen += torch.where(found, label_logit, 0.0)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=-1))
        # Sums are of what is left of logits once the largest so far is taken away.
        logits -= largest[:, None]
        weights = torch.exp(logits, out=memory[: logits.numel()].view(logits.shape))
        shrink = (before - largest).exp_()
        moved = torch.where(total > 0, total * (before - largest), 0.0)
        weighted = (weighted + moved) * shrink
        total = total * shrink + weights.sum(dim=-1)
        weighted += weights.mul_(logits).sum(dim=-1)
    normaliser = largest + total.log()
    return chosen - normaliser, total.log() - weighted / total, normaliser


def _backward(call, tensors, outputs, upstream):
    """Gradients by hidden states and, where it is trained, the head.

    d log_prob / dz = onehot - p;  d entropy / dz = -p (log p + entropy).
    """
    hidden, head, labels = tensors
    (_, entropy), normaliser = outputs
    given = labels, normaliser, entropy, *upstream
    by_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    by_head = torch.zeros_like(head, dtype=torch.float32) if call.trains_head else None
    memory = torch.empty(min(call.rows, len(hidden)) * min(call.tokens, len(head)))
    for first, tokens in _tiles(head, call.tokens):
        for start, rows in _tiles(hidden, call.rows):
            own = slice(start, start + len(rows))
            row = _Row(*(values[own] for values in given))
            change = _change(call, call.logits(rows, tokens), row, first, memory)
            change = change.to(head.dtype)
            by_hidden[own] += projection(change, tokens)
            if call.trains_head:
                by_head[first : first + len(tokens)] += projection(change.t(), rows)
    found = (by_hidden, by_head) if call.trains_head else (by_hidden,)
    return tuple(gradient.to(head.dtype) for gradient in found)


class _Row(NamedTuple):
    """What the gradient needs of each row, `[R]` each."""

    labels: Any
    normaliser: Any
    entropy: Any
    by_log_prob: Any
    by_entropy: Any


def _change(call, logits, row, first, memory):
    """The gradient by a tile of products, written over its `logits`."""
    slope = call.slope(logits)
    log_p = logits.sub_(row.normaliser[:, None])
    places, found = _in_tile(row.labels, first, logits.shape[1])
    if row.by_entropy.any():
        p = torch.exp(log_p, out=memory[: logits.numel()].view(logits.shape))
        change = log_p.add_(row.entropy[:, None]).mul_(row.by_entropy[:, None])
        change.add_(row.by_log_prob[:, None]).mul_(p).neg_()
    else:
        change = log_p.exp_().mul_(-row.by_log_prob[:, None])
    hit = torch.where(found, row.by_log_prob, 0.0)
    return change.scatter_add_(1, places[:, None], hit[:, None]).mul_(slope)


def _tiles(tensor, size):
    """`(first, tile)` of each tile of `size` along the first axis."""
    return zip(range(0, len(tensor), size), tensor.split(size))


def _in_tile(labels, first, width):
    """Where labels are in a tile of tokens, int64; and whether they are in it."""
    places = labels.long() - first
    found = (places >= 0) & (places < width)
    return places.clamp(0, width - 1), found
