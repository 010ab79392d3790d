"""Where the blocks of a document stand: anchors, positions, masks.

A document of T tokens carries K blocks. Block k is *anchored* after the first
`a_k = context_length + k * stride` document tokens and generates
`rollout_length` tokens, whose true counterparts are document tokens
`a_k ... a_k + rollout_length - 1`.
"""

import numpy as np

from keras_ebft.configurable import Shown
from keras_ebft.validation import check_int


class BlockGeometry(Shown):
    """Anchors, positions and attention mask of strided block-parallel sampling.

    The number of blocks is

        K = (length - rollout_length - context_length) // stride + 1

    (Jelassi et al., 2026, arXiv:2603.12248). `length` need not fit the stride:
    tokens after the last block's window are context for nobody and cost nothing
    but their own forward pass.

    Args:
        length: int, document length T in tokens.
        context_length: int, document tokens seen by the first block.
        rollout_length: int, tokens generated per block (G).
        stride: int, tokens between neighbouring anchors.

    Attributes:
        num_blocks: int, K.
        anchors: int32 array `[K]`, document tokens that each block sees.
        positions: int32 array `[K, G]`, position ids of the generated tokens,
            which are also the indices of their true counterparts.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if an argument is below 1, or `length` holds no block.

    Example:
    >>> geometry = BlockGeometry(20, context_length=4, rollout_length=4, stride=6)
    >>> geometry.anchors
    array([ 4, 10, 16], dtype=int32)
    >>> geometry.positions[1]
    array([10, 11, 12, 13], dtype=int32)
    """

    def __init__(
        self,
        length: int,
        context_length: int = 8,
        rollout_length: int = 8,
        stride: int = 8,
    ) -> None:
        self.length = check_int("length", length, 1)
        self.context_length = check_int("context_length", context_length, 1)
        self.rollout_length = check_int("rollout_length", rollout_length, 1)
        self.stride = check_int("stride", stride, 1)
        room = self.length - self.context_length - self.rollout_length
        if room < 0:
            raise ValueError(
                "Expected documents of at least context_length + rollout_length = "
                f"{self.context_length} + {self.rollout_length} = "
                f"{self.context_length + self.rollout_length} tokens, so that one "
                f"block fits. Received: length={self.length}. Use longer documents, "
                "or a sampler with a shorter `context_length` or `rollout_length`."
            )
        self.num_blocks = room // self.stride + 1
        blocks = np.arange(self.num_blocks, dtype="int32")
        self.anchors = self.context_length + self.stride * blocks
        steps = np.arange(self.rollout_length, dtype="int32")
        self.positions = self.anchors[:, None] + steps[None, :]

    def attention_mask(self) -> np.ndarray:
        """Who may attend to whom, document and all blocks of one sample.

        Returns:
            bool array `[T + K*G, T + K*G]`, True where the row (query) attends
            to the column (key). Generated tokens are block-major: token t of
            block k has index `T + k*G + t`.
        """
        length, steps = self.length, self.rollout_length
        document_index = np.arange(length)
        block = np.repeat(np.arange(self.num_blocks), steps)
        step = np.tile(np.arange(steps), self.num_blocks)
        total = length + self.num_blocks * steps
        mask = np.zeros((total, total), dtype=bool)
        mask[:length, :length] = document_index[None, :] <= document_index[:, None]
        mask[length:, :length] = document_index[None, :] < self.anchors[block][:, None]
        same_block = block[:, None] == block[None, :]
        mask[length:, length:] = same_block & (step[None, :] <= step[:, None])
        return mask
