"""Continuing documents with networks that only run whole rows.

What `prefix_cache` does with shared keys and values, done by running each block as
a plain causal sequence: its document up to the anchor and then its own tokens. All
that is kept of a document is its tokens.
"""

import numpy as np
from keras import ops


def check_one_document_per_row(network, documents):
    """Raises a `ValueError` for packed documents.

    Args:
        network: `RowNetwork`, which would let them see each other.
        documents: `Documents`.
    """
    if documents.starts is not None:
        raise ValueError(
            "Expected one document per row for a "
            f"{type(network.backbone).__name__}, whose attention cannot be kept "
            "within a document. Received: segment_ids. Leave them out and pad each "
            "document to a row of its own."
        )


def read_rows(network, token_ids, tokens, anchors):
    """Runs a network over all generated tokens of all blocks and samples.

    Args:
        network: `RowNetwork`.
        token_ids: int32 tensor `[B, T]`, documents.
        tokens: int32 tensor `[B, n, K, Q]`, the first Q tokens of each block.
        anchors: int32 `[K]` or `[B, K]`, document tokens each block sees.

    Returns:
        The network's outputs, each `[B, n, K, Q, D]`.
    """
    shape = tuple(tokens.shape)
    length = _row_length(token_ids, anchors, shape[-1])
    anchors = _per_block(anchors, shape)
    # The index of a row's token within its block, negative in the document.
    step = ops.arange(length, dtype="int32") - anchors[..., None]
    missing = length - token_ids.shape[1]
    document = ops.pad(token_ids, ((0, 0), (0, missing)))[:, None, None, :]
    own = ops.take_along_axis(tokens, ops.clip(step, 0, shape[-1] - 1), axis=-1)
    # What follows a block's tokens is never seen by them.
    rows = ops.where(step < 0, ops.broadcast_to(document, own.shape), own)
    index = anchors[..., None] + ops.arange(shape[-1], dtype="int32")

    def generated(output):
        return ops.take_along_axis(output, index[..., None], axis=-2)

    outputs = network(rows)
    if isinstance(outputs, (list, tuple)):
        return [generated(output) for output in outputs]
    return generated(outputs)


def _row_length(token_ids, anchors, steps):
    """The documents' length, or more where blocks may reach beyond it."""
    length = token_ids.shape[1]
    if isinstance(anchors, np.ndarray):
        return max(length, int(anchors.max()) + steps)
    return length + steps


def _per_block(anchors, shape):
    anchors = ops.cast(ops.convert_to_tensor(anchors), "int32")
    if len(anchors.shape) == 2:
        anchors = anchors[:, None]
    return ops.broadcast_to(anchors, shape[:3])


class RowDecoder:
    """Reads one more token of every block and sample per call.

    Args:
        network: `RowNetwork`.
        token_ids: int32 tensor `[B, T]`, documents.
        anchors: int32 `[K]` or `[B, K]`.
        shape: `(B, n, K, P)`, P the tokens that will be read per block.
    """

    def __init__(self, network, token_ids, anchors, shape):
        self.network = network
        self.token_ids = token_ids
        self.anchors = anchors
        self.shape = shape

    def empty_caches(self):
        """Zeros for each block's own tokens, `[B, n, K, P]`."""
        return ops.zeros(self.shape, dtype="int32")

    def __call__(self, tokens, step, caches):
        """Reads token `step` of every block.

        Args:
            tokens: int32 tensor `[B, n, K]`.
            step: int or int scalar tensor, in `[0, P)`.
            caches: int32 tensor `[B, n, K, P]`, tokens so far.

        Returns:
            `(outputs, caches)`: outputs `[B, n, K, D]` and the new tokens.
        """
        caches = ops.slice_update(caches, (0, 0, 0, step), tokens[..., None])
        outputs = read_rows(self.network, self.token_ids, caches, self.anchors)
        size = (*self.shape[:3], 1, outputs.shape[-1])
        return ops.slice(outputs, (0, 0, 0, step, 0), size)[..., 0, :], caches
