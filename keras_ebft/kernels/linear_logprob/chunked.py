"""`linear_logprob` in tiles of rows and tokens, made again in the backward pass.

Logits exist one tile at a time, whatever the number of rows and the vocabulary;
between the passes one normaliser per row stays in memory.
"""

import functools
from typing import Any, NamedTuple

from keras import ops

from keras_ebft.backend.gradients import (
    differentiable,
    may_have_gradient,
    scan_tiles,
)
from keras_ebft.backend.replicas import parts_of_program
from keras_ebft.kernels.linear_logprob.reference import scaled_logits
from keras_ebft.kernels.projection import projection
from keras_ebft.kernels.row_chunks import RowChunks

# A tile of logits, 8 MiB in float32: small enough for a cache, large enough for
# products at full speed.
ROWS = 1024
TOKENS = 2048
# Logits of tokens that are not there: weighed with 0, so its square must be finite.
NO_LOGIT = -1e15


def linear_logprob_chunked(hidden, head, labels, *, temperature=1.0, soft_cap=None):
    """See `keras_ebft.kernels.linear_logprob`."""
    parts = parts_of_program(hidden.shape[0])
    has_gradients = may_have_gradient(head)
    call = _Call(temperature, soft_cap, parts, ROWS, TOKENS, has_gradients)
    tensors, differentiated = (hidden, head, labels), 1 + has_gradients
    scores = differentiable(_forward, _backward, call, tensors, differentiated)
    return scores[0], scores[1]


class _Call(NamedTuple):
    """A call without its tensors: how logits are scaled, and the size of a tile.

    `parts` is on how many devices the rows lie; `trains_head` whether the gradient by
    the head is asked for.
    """

    temperature: float
    soft_cap: Any
    parts: int
    rows: int
    tokens: int
    trains_head: bool

    def tiles(self, hidden, head):
        """The `_Tiles` of hidden states `[R, D]` and a head `[V, D]`."""
        rows, tokens = hidden.shape[0], head.shape[0]
        return _Tiles(rows, tokens, self.parts, self.rows, self.tokens)

    def logits(self, tiles, hidden, head, index):
        """Logits of rows and a tile of tokens."""
        logits = scaled_logits(
            hidden,
            head,
            temperature=self.temperature,
            soft_cap=self.soft_cap,
            multiply=projection,
        )
        return tiles.without_padding(logits, index)

    def slope(self, logits):
        """Derivative of scaled logits by the plain ones."""
        if self.soft_cap is None:
            return 1.0 / self.temperature
        # Logits times temperature over the cap are the tanh itself.
        squared = ops.square(logits * (self.temperature / self.soft_cap))
        return (1.0 - squared) / self.temperature


def _forward(call, hidden, head, labels):
    """Log-probability and entropy `[2, R]`, normaliser `[R]`."""
    tiles = call.tiles(hidden, head)
    logits_of = functools.partial(call.logits, tiles)
    scores = _score(tiles, logits_of, *tiles.cut(hidden, head, labels))
    log_prob, entropy, normaliser = map(tiles.rows.joined, scores)
    return ops.stack([log_prob, entropy]), normaliser


def _backward(call, tensors, outputs, upstream):
    hidden, head, labels = tensors
    scores, normaliser = outputs
    tiles = call.tiles(hidden, head)
    logits_of = functools.partial(call.logits, tiles)
    hidden, head, labels = tiles.cut(hidden, head, labels)
    by_row = (normaliser, scores[1], upstream[0], upstream[1])
    given = _Given(labels, *map(tiles.rows.cut, by_row))
    push = functools.partial(_push, tiles, logits_of, call.slope)
    by_hidden, by_head = push(hidden, head, given, call.trains_head)
    by_hidden = ops.cast(tiles.rows.joined(by_hidden), hidden.dtype)
    if not call.trains_head:
        return (by_hidden,)
    by_head = ops.reshape(by_head, (-1, by_head.shape[-1]))
    return by_hidden, ops.cast(by_head[: tiles.tokens], head.dtype)


class _Given(NamedTuple):
    """What the gradient needs of each row, `[R]` each."""

    labels: Any
    normaliser: Any
    entropy: Any
    by_log_prob: Any
    by_entropy: Any


class _Tiles:
    """Rows and tokens cut into equal parts, the last ones padded if need be."""

    def __init__(self, rows, tokens, parts, tile_rows, tile_tokens):
        self.rows = RowChunks(rows, parts, -(-rows // parts // tile_rows))
        self.tokens = tokens
        self.token_tiles = _even_split(tokens, -(-tokens // tile_tokens))
        self.width = -(-tokens // self.token_tiles)

    def cut(self, hidden, head, labels):
        """Rows in tiles, and a head of tokens that fill all of theirs."""
        padding = self.token_tiles * self.width - self.tokens
        head = ops.pad(head, ((0, padding), (0, 0))) if padding else head
        return self.rows.cut(hidden), head, self.rows.cut(labels)

    def tokens_at(self, head, index):
        return ops.slice(head, (index * self.width, 0), (self.width, head.shape[1]))

    def without_padding(self, logits, index):
        """Logits of a tile of tokens, hidden where tokens are padding."""
        if self.token_tiles * self.width == self.tokens:
            return logits
        token = index * self.width + ops.arange(self.width, dtype="int32")
        return ops.where(token < self.tokens, logits, NO_LOGIT)

    def one_hot(self, labels, index):
        """Which token of a tile is a row's label, bool `[rows, tokens]`."""
        token = index * self.width + ops.arange(self.width, dtype="int32")
        return labels[:, None] == token


def _score(tiles, logits_of, hidden, head, labels):
    """Log-probability, entropy and normaliser, float32, each cut as rows are."""

    def row_tile(row_index, carry):
        rows, row_labels = (tiles.rows.at(v, row_index) for v in (hidden, labels))

        def see(index, state):
            largest, total, weighted, chosen = state
            logits = logits_of(rows, tiles.tokens_at(head, index), index)
            new_largest = ops.maximum(largest, ops.max(logits, axis=-1))
            shrink = ops.exp(largest - new_largest)
            weights = ops.exp(logits - new_largest[:, None])
            label_logit = ops.where(tiles.one_hot(row_labels, index), logits, 0.0)
            return (
                new_largest,
                total * shrink + ops.sum(weights, axis=-1),
                weighted * shrink + ops.sum(weights * logits, axis=-1),
                chosen + ops.sum(label_logit, axis=-1),
            )

        zeros = ops.zeros((tiles.rows.size,), dtype="float32")
        state = (zeros + NO_LOGIT, zeros, zeros, zeros)
        state = ops.fori_loop(0, tiles.token_tiles, see, state)
        largest, total, weighted, chosen = state
        normaliser = largest + ops.log(total)
        entropy = normaliser - weighted / total
        found = chosen - normaliser, entropy, normaliser
        return tuple(
            tiles.rows.put(whole, row_index, own) for whole, own in zip(carry, found)
        )

    return ops.fori_loop(
        0, tiles.rows.count, row_tile, tuple(tiles.rows.zeros() for _ in range(3))
    )


def _push(tiles, logits_of, slope, hidden, head, given, trains_head):
    """Gradients by hidden states `[R, D]` and head `[token tiles, width, D]`.

    Where the head is not trained, that by it is `None`.

    d log_prob / dz = onehot - p;  d entropy / dz = -p (log p + entropy).
    """

    def token_tile(index, carry):
        tokens = tiles.tokens_at(head, index)

        def push(row_index, state):
            by_hidden, by_tokens = state
            rows = tiles.rows.at(hidden, row_index)
            row = _Given(*(tiles.rows.at(v, row_index) for v in given))
            logits = logits_of(rows, tokens, index)
            log_p = logits - row.normaliser[:, None]
            p = ops.exp(log_p)
            hit = ops.cast(tiles.one_hot(row.labels, index), "float32")
            change = row.by_log_prob[:, None] * (hit - p)
            change -= row.by_entropy[:, None] * p * (log_p + row.entropy[:, None])
            change = ops.cast(change * slope(logits), head.dtype)
            part = ops.cast(projection(change, tokens), "float32")
            part = part + tiles.rows.at(by_hidden, row_index)
            by_hidden = tiles.rows.put(by_hidden, row_index, part)
            if not trains_head:
                return by_hidden, by_tokens
            by_rows = tiles.rows.products(change, rows)
            return by_hidden, by_tokens + ops.cast(by_rows, "float32")

        # What devices found is summed once, after the loop.
        shape = (tiles.rows.parts, *tokens.shape) if trains_head else (1,)
        own = ops.zeros(shape, dtype="float32")
        by_hidden, by_tokens = ops.fori_loop(0, tiles.rows.count, push, (carry[0], own))
        return (by_hidden,), (ops.cast(ops.sum(by_tokens, axis=0), head.dtype),)

    carry = (tiles.rows.zeros(head.shape[1]),)
    like = (((tiles.width, head.shape[1]) if trains_head else (), head.dtype),)
    carry, stacked = scan_tiles(token_tile, tiles.token_tiles, carry, like)
    return carry[0], stacked[0] if trains_head else None


def _even_split(size, least):
    """The smallest number of equal parts from `least` up, if there is one nearby."""
    for parts in range(least, 2 * least + 1):
        if size % parts == 0:
            return parts
    return least
