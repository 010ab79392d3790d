"""`tile_attention` for PyTorch on CPU, shared keys met by PyTorch's fused attention.

Op by op, every step of the online softmax takes scores through memory once more;
PyTorch's kernel keeps them in the cache. It returns the log-normaliser of each query
too, which is what it takes to join its output with that of a block's own keys, and
to push the gradient of the joined output back through either part.
"""

from typing import Any, NamedTuple

import torch

from keras_ebft.backend.gradients import differentiable, scan_tiles
from keras_ebft.kernels.attention_tiles import (
    LOWEST_SCORE,
    OwnKeys,
    Pushed,
    Ranges,
    Scores,
    finish,
    rows_of,
    see_own,
)

# Keys that all queries of a tile see are met without a mask, which takes a sixth of
# the time to make; fewer than this do not make up for a call of their own.
FEWEST_OPEN_KEYS = 128
# Numbers of masks that `Spans` hold, 16 MiB: what is larger is made for every call.
MOST_NUMBERS_KEPT = 2**22

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fused_tile_attention(query, key, value, ranges, scores, own):
    """See `tile_attention`; `scores` without soft cap, `own` keys always given.

    `ranges` are `Spans`, which layers and tokens that see the same keys can share.
    """
    call = _FusedCall(scores, ranges)
    tensors = (query, key, value, own.key, own.value, own.seen)
    return differentiable(_attend, _attend_gradient, call, tensors, 5)


class _FusedCall(NamedTuple):
    """A call without its tensors."""

    scores: Scores
    spans: "Spans"

    def unpack(self, tensors):
        """`(query, shared keys, own keys)`."""
        query, key, value, *own = tensors
        shared = _SharedKeys(key, value, self.spans, self.scores)
        return query, shared, OwnKeys(*own)


def _attend(call, *tensors):
    """`(output, log_normaliser)`, the latter float32 `[N, B, Hkv, C, Q]`."""
    query, shared, own = call.unpack(tensors)

    def attend_tile(index, carry):
        state = shared.see(
            index, rows_of(query[index]), see_own(query, own, index, call.scores)
        )
        output, log_normaliser = finish(state, query.dtype)
        shape = query.shape[1:]
        return carry, (output.reshape(shape), log_normaliser.reshape(shape[:-1]))

    return scan_tiles(attend_tile, query.shape[0], (), ())[1]


def _attend_gradient(call, tensors, outputs, upstream):
    """Gradients by query, key, value and own key and value."""
    query, shared, own = call.unpack(tensors)
    output, log_normaliser = outputs
    delta = (upstream.float() * output.float()).sum(dim=-1)
    by_key = torch.zeros_like(shared.key, dtype=torch.float32)
    by_value = torch.zeros_like(by_key)

    def tile_gradient(index, carry):
        tile = Pushed(
            query[index], upstream[index], log_normaliser[index], delta[index]
        )
        by_query, *by_own = tile.gradients(
            own.key[index], own.value[index], own.seen, call.scores
        )
        by_query += shared.push(
            index, tile.rows(), rows_of(output[index]), by_key, by_value
        ).reshape(by_query.shape)
        return carry, tuple(g.to(query.dtype) for g in (by_query, *by_own))

    stacked = scan_tiles(tile_gradient, query.shape[0], (), ())[1]
    shared_gradients = (g.to(query.dtype) for g in (by_key, by_value))
    return (stacked[0], *shared_gradients, *stacked[1:])


class _SharedKeys:
    """Keys and values `[B, Hkv, T, d]`, and which of them each query sees."""

    def __init__(self, key, value, spans, scores):
        self.key, self.value = key, value
        self.spans = spans
        self.scale = scores.scale

    def see(self, index, query, state):
        """The online softmax `state` once a tile of queries has seen its keys."""
        for span in self.spans.of(index, self.key.dtype):
            state = self._see(span, query, state)
        return state

    def _see(self, span, query, state):
        output, log_normaliser = _FORWARD(
            query,
            self.key[:, :, span.keys],
            self.value[:, :, span.keys],
            attn_mask=span.mask,
            scale=self.scale,
        )
        largest, total, weighted = state
        new_largest = torch.maximum(largest, log_normaliser)
        shrink, share = (
            (largest - new_largest).exp(),
            (log_normaliser - new_largest).exp(),
        )
        return (
            new_largest,
            total * shrink + share,
            weighted * shrink[..., None] + output * share[..., None],
        )

    def push(self, index, tile, output, by_key, by_value):
        """Gradient by a tile of queries, float32; adds those by keys and values.

        With the output and log-normaliser of all keys together, the kernel's
        gradient is that of its part of them.
        """
        by_query = torch.zeros_like(tile.query, dtype=torch.float32)
        for span in self.spans.of(index, self.key.dtype):
            query_part, key_part, value_part = _BACKWARD(
                tile.upstream,
                tile.query,
                self.key[:, :, span.keys],
                self.value[:, :, span.keys],
                output,
                tile.log_normaliser,
                0.0,
                False,
                attn_mask=span.mask,
                scale=self.scale,
            )
            by_query += query_part
            by_key[:, :, span.keys] += key_part
            by_value[:, :, span.keys] += value_part
        return by_query


class Spans:
    """Keys that the queries of each tile see, remembered from one call to the next.

    Args:
        ranges: `Ranges`.
    """

    def __init__(self, ranges: Ranges):
        self.low, self.high = ranges.low, ranges.high
        self.bounds = [tuple(map(int, bounds)) for bounds in ranges[2:]]
        self._found = {}
        self._numbers_kept = 0

    def of(self, index, dtype):
        """The `_Span`s of a tile of queries, in order, with masks of a dtype."""
        if (index, dtype) in self._found:
            return self._found[index, dtype]
        low, high = self.low[index], self.high[index]
        spans = [
            _Span(slice(*ends), _mask(low, high, ends, dtype) if masked else None)
            for ends, masked in self._ends(index)
        ]
        numbers = sum(span.mask.numel() for span in spans if span.mask is not None)
        if self._numbers_kept + numbers <= MOST_NUMBERS_KEPT:
            self._numbers_kept += numbers
            self._found[index, dtype] = spans
        return spans

    def _ends(self, index):
        """`((start, stop), whether some queries do not see all of it)` of each span."""
        first, last = (bounds[index] for bounds in self.bounds)
        # Between these two every query sees every key.
        open_from = min(max(int(self.low[index].max()), first), last)
        open_to = max(min(int(self.high[index].min()), last), open_from)
        if open_to - open_from < FEWEST_OPEN_KEYS:
            open_from = open_to = first
        ends = (first, open_from), (open_from, open_to), (open_to, last)
        masked = True, False, True
        return [found for found in zip(ends, masked) if found[0][0] < found[0][1]]


def _mask(low, high, ends, dtype):
    place = torch.arange(*ends, dtype=low.dtype)
    hidden = (place < low[..., None]) | (place >= high[..., None])
    mask = torch.zeros(hidden.shape, dtype=dtype)
    # Finite: a query that sees none of these keys then weighs them with 0.
    return mask.masked_fill_(hidden, LOWEST_SCORE)[:, None]


class _Span(NamedTuple):
    """Keys that follow one another, and the mask `[B or 1, 1, M, keys]` or `None`."""

    keys: slice
    mask: Any
