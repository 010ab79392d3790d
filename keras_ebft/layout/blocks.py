"""The blocks of a batch: where they stand and which of their tokens count."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_ebft.layout.documents import Documents, take_tokens
from keras_ebft.typing import Tensor


class Blocks(NamedTuple):
    """K blocks in each of B rows.

    Attributes:
        anchors: int32 NumPy array `[K]`, the same for all rows, or int32 tensor
            `[B, K]`: row index of a block's first true token. Dead blocks have
            some harmless anchor.
        starts: int32 tensor `[B, K]`, row index of the first token of a block's
            document; `None` if every row is one document.
        live: bool tensor `[B, K]`. Dead blocks count for nothing.
        counted: bool tensor `[B, K, G]`, generated tokens that count, as far as
            the document decides (stop tokens end a rollout earlier).
        true_index: int NumPy array `[K, G]` or int32 tensor `[B, K, G]`, row
            index of the true tokens.
        true_exists: bool tensor `[B, K, G]`, true tokens that are there.
        true_counted: bool tensor `[B, K, G]`, true tokens that count.
    """

    anchors: Tensor
    starts: Tensor | None
    live: Tensor
    counted: Tensor
    true_index: Tensor
    true_exists: Tensor
    true_counted: Tensor

    @property
    def first_positions(self) -> Tensor:
        """Position ids of the first generated tokens, `[K]` or `[B, K]`."""
        if self.starts is None:
            return ops.convert_to_tensor(self.anchors)
        return ops.subtract(self.anchors, self.starts)

    def as_tensors(self) -> "Blocks":
        """The same `Blocks` with every field of its own for each row, as tensors."""
        batch = self.live.shape[0]

        def per_row(index: Tensor, rank: int) -> Tensor:
            index = ops.cast(ops.convert_to_tensor(index), "int32")
            if len(index.shape) == rank:
                return index
            return ops.broadcast_to(index[None], (batch, *index.shape))

        return self._replace(
            anchors=per_row(self.anchors, 2), true_index=per_row(self.true_index, 3)
        )

    def absolute_anchors(self) -> Tensor:
        """Where living blocks stand, int32 tensor `[B, K]`, -1 for dead ones."""
        return ops.where(self.live, self.as_tensors().anchors, -1)

    def positions(self, shape: tuple[int, ...]) -> Tensor:
        """Position ids of generated tokens.

        Args:
            shape: `(B, n, K, Q)`.

        Returns:
            int32 tensor of that shape.
        """
        first = self.first_positions
        if len(first.shape) == 2:
            first = first[:, None]
        steps = ops.arange(shape[-1], dtype="int32")
        return ops.broadcast_to(first[..., None] + steps, shape)


def make_blocks(
    documents: Documents,
    anchors: Tensor,
    rollout_length: int,
    *,
    context_length: int = 1,
    short_windows: bool = False,
    answer_only: bool = False,
) -> Blocks:
    """Decides which blocks live and which of their tokens count.

    A block lives if its whole window of `rollout_length` true tokens is real
    text of one document that shows it `context_length` tokens, and holds a token
    that counts. With `short_windows` the true tokens may end early.

    Args:
        documents: `Documents`.
        anchors: int32 NumPy array `[K]` or int32 tensor `[B, K]`, -1 for none.
        rollout_length: int, G.
        context_length: int, tokens of its own document a block must see.
        short_windows: bool.
        answer_only: bool, whether the true tokens end where the answer that
            begins at the anchor ends.

    Returns:
        `Blocks`.
    """
    length = documents.token_ids.shape[1]
    library = np if isinstance(anchors, np.ndarray) else ops
    present = anchors >= context_length
    anchors = library.clip(anchors, 1, length - 1)
    window = anchors[..., None] + library.arange(rollout_length, dtype="int32")
    inside, window = window < length, library.minimum(window, length - 1)
    exists = ops.logical_and(take_tokens(documents.padding_mask, window), inside)
    starts = None
    if documents.starts is not None:
        # A block belongs to the document of the token it continues.
        starts = take_tokens(documents.starts, anchors - 1)
        own = take_tokens(documents.starts, window) == starts[..., None]
        exists = ops.logical_and(exists, own)
        seen = ops.subtract(anchors, starts)
        present = ops.logical_and(present, seen >= context_length)
    counts = exists
    if documents.answer_mask is not None:
        counts = ops.logical_and(exists, take_tokens(documents.answer_mask, window))
    if answer_only:
        gaps = ops.cumsum(ops.cast(ops.logical_not(counts), "int32"), axis=-1)
        exists = counts = gaps == 0
    whole = ops.any(exists, axis=-1) if short_windows else ops.all(exists, axis=-1)
    live = ops.logical_and(ops.logical_and(whole, ops.any(counts, axis=-1)), present)
    if library is ops:
        # Dead blocks run along at a place that every network can read.
        anchors = ops.where(live, anchors, 1)
        starts = None if starts is None else ops.where(live, starts, 0)
    # Where the true text has ended already, what the model adds counts too.
    counted = ops.logical_or(counts, ops.logical_not(exists))
    return Blocks(
        anchors,
        starts,
        live,
        ops.logical_and(counted, live[..., None]),
        window,
        exists,
        counts,
    )


def live_places(
    rows: Mapping[str, np.ndarray],
    rollout_length: int,
    *,
    context_length: int = 1,
    short_windows: bool = False,
    answer_only: bool = False,
) -> np.ndarray:
    """Where a block would live, as `make_blocks` decides it, counted on the host.

    Args:
        rows: dict of arrays `[B, T]`: `padding_mask` and optionally `segment_ids`,
            `answer_mask`.
        rollout_length: int, G.
        context_length: int, tokens of its own document a block must see.
        short_windows: bool.
        answer_only: bool.

    Returns:
        bool array `[B, T]`, one place for every anchor from 0.
    """
    mask = np.asarray(rows["padding_mask"])
    batch, length = mask.shape
    place = np.arange(length)
    segments = rows.get("segment_ids", np.zeros_like(mask, "int32"))
    begins = np.ones((batch, length), bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    # Where the document of each token ends, or its real part.
    last = np.where(begins, place, length)[:, ::-1]
    after = np.minimum.accumulate(last, axis=1)[:, ::-1]
    ends = np.full((batch, length), length)
    ends[:, :-1] = after[:, 1:]
    ends = np.minimum(ends, mask.sum(axis=1, keepdims=True))
    # A block belongs to the document of the token before it.
    starts, ends = (np.roll(values, 1, axis=1) for values in (starts, ends))
    until = np.minimum(place + rollout_length, ends)
    exist = until - place
    counts = mask & np.asarray(rows.get("answer_mask", mask))
    if answer_only:
        lives = (exist >= 1) & counts
    else:
        lives = exist >= (1 if short_windows else rollout_length)
        before = np.concatenate([np.zeros((batch, 1), int), counts.cumsum(1)], axis=1)
        held = np.take_along_axis(before, np.maximum(until, 0), axis=1)
        lives &= held > before[:, :-1]
    seen = place - starts
    return lives & (place >= max(context_length, 1)) & (seen >= context_length)


def answer_starts(documents: Documents) -> Tensor:
    """Where an answer begins, bool `[B, T]`.

    Args:
        documents: `Documents` with an answer mask.
    """
    answers = ops.logical_and(documents.answer_mask, documents.padding_mask)
    continued = answers[:, :-1]
    if documents.starts is not None:
        same = documents.starts[:, 1:] == documents.starts[:, :-1]
        continued = ops.logical_and(continued, same)
    continued = ops.pad(continued, ((0, 0), (1, 0)))
    return ops.logical_and(answers, ops.logical_not(continued))


def choose_anchors(allowed: Tensor, priority: Tensor, num_anchors: int) -> Tensor:
    """The `num_anchors` allowed places of highest priority in each row.

    Args:
        allowed: bool tensor `[B, T]`.
        priority: float32 tensor `[B, T]` or `[T]`, not negative.
        num_anchors: int.

    Returns:
        int32 tensor `[B, num_anchors]`, increasing, -1 where a row allows fewer.
    """
    priority = ops.where(allowed, priority, -1.0)
    found, places = ops.top_k(priority, num_anchors)
    return ops.sort(ops.where(found >= 0.0, ops.cast(places, "int32"), -1), axis=-1)
