"""Rows of tokens as the step sees them: what is real, what belongs together.

A row holds one document, padded on the right, or several one after the other
(*packed*), told apart by `segment_ids`. Positions and attention restart at each
document.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_ebft.typing import Tensor


class Documents(NamedTuple):
    """A batch of rows.

    Attributes:
        token_ids: int32 tensor `[B, T]`.
        padding_mask: bool tensor `[B, T]`, True where a token is real.
        starts: int32 tensor `[B, T]`, index of the first token of each token's
            document; `None` if every row is one document.
        answer_mask: bool tensor `[B, T]`, True for answer tokens; `None` if every
            token counts.
        anchors: int32 tensor `[B, K]` of given anchors, -1 for none; or `None`.
    """

    token_ids: Tensor
    padding_mask: Tensor
    starts: Tensor | None = None
    answer_mask: Tensor | None = None
    anchors: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Position ids `[B, T]`, from 0 within each document."""
        index = ops.arange(self.token_ids.shape[1], dtype="int32")[None, :]
        if self.starts is None:
            return ops.broadcast_to(index, self.token_ids.shape)
        return index - self.starts

    @property
    def next_token_mask(self) -> Tensor:
        """Which next tokens count in the cross-entropy, bool `[B, T - 1]`.

        Token t + 1 counts if it is real, continues token t's document and, with
        an answer mask, is an answer token.
        """
        mask = self.padding_mask[:, 1:]
        if self.starts is not None:
            same = self.starts[:, 1:] == self.starts[:, :-1]
            mask = ops.logical_and(mask, same)
        if self.answer_mask is not None:
            mask = ops.logical_and(mask, self.answer_mask[:, 1:])
        return mask


def read_documents(inputs: dict[str, Tensor]) -> Documents:
    """`Documents` from the dict of tensors that `EBFTModel.call` takes.

    Args:
        inputs: dict of `token_ids`, `padding_mask` and optionally `segment_ids`,
            `answer_mask` `[B, T]` and `anchors` `[B, K]`.
    """
    segment_ids = inputs.get("segment_ids")
    return Documents(
        inputs["token_ids"],
        inputs["padding_mask"],
        None if segment_ids is None else first_of_segment(segment_ids),
        inputs.get("answer_mask"),
        inputs.get("anchors"),
    )


def first_of_segment(segment_ids: Tensor) -> Tensor:
    """Index of the first token of each token's segment.

    Args:
        segment_ids: int tensor `[B, T]`; a segment is a run of equal numbers.

    Returns:
        int32 tensor `[B, T]`.

    Example:
    >>> starts = first_of_segment(ops.convert_to_tensor([[3, 3, 1, 1, 1, 3]]))
    >>> ops.convert_to_numpy(starts).tolist()
    [[0, 0, 2, 2, 2, 5]]
    """
    length = segment_ids.shape[1]
    index = ops.arange(length, dtype="int32")[None, :]
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = ops.pad(ops.where(begins, index[:, 1:], 0), ((0, 0), (1, 0)))
    # Running maximum by doubling: no backend-neutral one exists.
    shift = 1
    while shift < length:
        earlier = ops.pad(starts[:, :-shift], ((0, 0), (shift, 0)))
        starts = ops.maximum(starts, earlier)
        shift *= 2
    return starts


def take_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Picks tokens of every row.

    Args:
        values: tensor `[B, T, ...]`.
        index: int NumPy array `[...]`, the same for all rows, or int tensor
            `[B, ...]`.

    Returns:
        tensor `[B, *index axes, ...]`.
    """
    if isinstance(index, np.ndarray):
        return ops.take(values, index, axis=1)
    index = ops.cast(index, "int32")
    batch, length, *rest = values.shape
    row = ops.arange(batch, dtype="int32") * length
    row = ops.reshape(row, (batch, *[1] * (len(index.shape) - 1)))
    return ops.take(ops.reshape(values, (batch * length, *rest)), index + row, axis=0)
