"""Packed rows taken apart into their documents, one to a row."""

from typing import Any

import numpy as np

from keras_ebft.data.row_batches import Rows

ARRAYS = ("token_ids", "padding_mask", "answer_mask")


def single_documents(rows: dict[str, Any]) -> Rows:
    """Gives every document a row of its own.

    A plain causal language model then reads each as it was meant to be read.

    Args:
        rows: dict of `token_ids` `[N, T]`, and optionally `padding_mask`,
            `segment_ids` and `answer_mask`.

    Returns:
        dict of `token_ids` int32, `padding_mask` bool and `answer_mask` bool
        `[M, L]`, padded on the right to the longest document.
    """
    token_ids = np.asarray(rows["token_ids"])
    mask = np.asarray(rows.get("padding_mask", np.ones_like(token_ids)), dtype=bool)
    segments = np.asarray(rows.get("segment_ids", mask))
    answers = np.asarray(rows.get("answer_mask", mask), dtype=bool) & mask
    values = {"token_ids": token_ids, "padding_mask": mask, "answer_mask": answers}
    # Borders: where a row or a segment begins.
    begins = np.ones(token_ids.shape, dtype=bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.flatnonzero(begins[mask])
    sizes = np.diff(starts, append=np.count_nonzero(mask))
    row = np.repeat(np.arange(len(sizes)), sizes)
    column = np.arange(len(row)) - np.repeat(starts, sizes)
    shape = (len(sizes), int(sizes.max(initial=0)))
    apart = {name: np.zeros(shape, values[name].dtype) for name in ARRAYS}
    for name, array in apart.items():
        array[row, column] = values[name][mask]
    apart["token_ids"] = apart["token_ids"].astype("int32")
    return apart
