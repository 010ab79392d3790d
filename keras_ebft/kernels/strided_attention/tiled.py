"""`strided_attention` over tiles of blocks, each reading keys to its last anchor.

Blocks near the start of a document see little of it. Attention of a group of
neighbouring blocks to `document[:last anchor of the group]` does about half the
work of attention to the whole document with a mask. Where anchors are only known
when the step runs, there is nothing to cut.
"""

import numpy as np
from keras import ops

from keras_ebft.kernels.strided_attention.reference import strided_attention_reference

# More groups save at most the share 1/(2 * groups) of the work that is left,
# and each is one more set of operations per layer to compile.
MAX_GROUPS = 8
# Groups of fewer blocks make products too small to run at full speed.
MIN_GROUP_BLOCKS = 8


def strided_attention_tiled(
    query,
    key,
    value,
    document_key=None,
    document_value=None,
    anchors=None,
    *,
    starts=None,
    **options,
):
    """See `keras_ebft.kernels.strided_attention`."""
    num_blocks = query.shape[2]
    size = max(-(-num_blocks // MAX_GROUPS), MIN_GROUP_BLOCKS)
    known = isinstance(anchors, np.ndarray) and anchors.ndim == 1
    if document_key is None or not known or num_blocks <= size:
        return strided_attention_reference(
            query, key, value, document_key, document_value, anchors,
            starts=starts, **options,
        )  # fmt: skip
    outputs = []
    for start in range(0, num_blocks, size):
        blocks = slice(start, min(start + size, num_blocks))
        seen = int(anchors[blocks].max())
        outputs.append(
            strided_attention_reference(
                query[:, :, blocks],
                key[:, :, blocks],
                value[:, :, blocks],
                document_key[:, :seen],
                document_value[:, :seen],
                anchors[blocks],
                starts=None if starts is None else starts[:, blocks],
                **options,
            )
        )
    return ops.concatenate(outputs, axis=2)
