"""Documents of any accepted form as checked arrays of token ids."""

import numpy as np

from keras_ebft.data import PackedRows, TextFiles
from keras_ebft.data.tables import as_documents
from keras_ebft.networks import maximum_length, to_numpy, vocabulary_size
from keras_ebft.training.texts import listed, rows_of_documents
from keras_ebft.validation import MOST_INT, check_id_range, check_integers

# What a row may consist of, and what fills up rows and batches.
DTYPES = {
    "token_ids": "int32",
    "padding_mask": "bool",
    "segment_ids": "int32",
    "answer_mask": "bool",
    "anchors": "int32",
}
FILLING = {
    "token_ids": 0,
    "padding_mask": False,
    "segment_ids": 0,
    "answer_mask": False,
    "anchors": -1,
}
# Zeros and ones.
FLAGS = ("padding_mask", "answer_mask")
# What int32 holds.
MOST_SEGMENTS = MOST_INT


def to_token_rows(x, causal_lm, trim=True, report=None):
    """Documents as token ids and padding mask: the one door for data.

    Args:
        x: list, vector or other sequence of documents as `keras_ebft.data.pack` takes
            them: strings, pairs `(prompt, answer)` of strings, vectors of token ids
            or pairs of them; an integer array `[N, T]` of token ids;
            `keras_ebft.data.PackedRows`; a DataFrame of pandas or polars, a
            `datasets.Dataset` or a `pathlib.Path` of a file or folder, see
            `keras_ebft.data.from_path`; or a dict with `token_ids` and optionally,
            all `[N, T]`: `padding_mask`, zeros and ones, padded on the right (by
            default everything is real, or what has a segment above 0);
            `segment_ids`, integers from 0 that tell apart the documents packed in a
            row; `answer_mask`, zeros and ones, which tokens are answers; and
            `anchors` `[N, K]`, where blocks stand, -1 for none.
        causal_lm: the `CausalLM` the documents are for; its preprocessor reads
            strings.
        trim: bool, whether rows of strings end with the longest document rather
            than at the preprocessor's `sequence_length`.
        report: `DataReport` that counts what is read, or `None`.

    Returns:
        dict of `token_ids` int32 `[N, T]`, `padding_mask` bool `[N, T]` and what
        else was given: `segment_ids` int32, `answer_mask` bool (also of pairs),
        `anchors` int32.

    Raises:
        TypeError: for token ids that are not integers, one document in place of
            several, or anything that is no document, such as messages.
        ValueError: for a wrong rank, ids outside the vocabulary, a mask that does
            not fit, has gaps or other values than 0 and 1, segments below 0, unknown
            keys, documents beyond the model's learned positions, or strings without
            a preprocessor.
    """
    lost, packing = None, None
    if isinstance(x, PackedRows):
        x, packing = x.arrays, x.report
    x = as_documents(x)
    if isinstance(x, TextFiles):
        x = list(x)
    documents = None if isinstance(x, dict) else listed(x)
    if isinstance(x, dict):
        rows = _from_dict(x)
    elif documents is None:
        rows = _from_dict({"token_ids": x})
    elif documents:
        rows, lost = rows_of_documents(documents, causal_lm, trim)
    else:
        raise ValueError(
            "Expected at least one document. Received: none. Check the data."
        )
    _check_token_ids(rows["token_ids"], causal_lm)
    _check_masks(rows)
    if "anchors" in rows:
        check_anchors(rows["anchors"], rows["token_ids"].shape)
    rows = {name: values.astype(DTYPES[name]) for name, values in rows.items()}
    if report is not None:
        report.count(rows, lost)
        if packing is not None:
            report.count_packing(packing)
    return rows


def to_rollouts(rollouts, causal_lm):
    """Rollouts that were given as checked arrays, before their shape is looked at.

    Args:
        rollouts: dict of `token_ids` and optionally `anchors`, or token ids alone.
        causal_lm: the `CausalLM` they are of.

    Returns:
        `(token_ids, anchors)`, integer arrays; `None` in place of anchors not given.

    Raises:
        TypeError: for token ids or anchors that are not integers.
        ValueError: for a dict without token ids, or ids outside the vocabulary.
    """
    given = rollouts if isinstance(rollouts, dict) else {"token_ids": rollouts}
    if given.get("token_ids") is None:
        raise ValueError(
            "Expected rollouts with 'token_ids'. Received: a dict with "
            f"{sorted(map(str, given))}. Pass what `rollout` returned."
        )
    found = {
        name: _array(name, given[name])
        for name in ("token_ids", "anchors")
        if given.get(name) is not None
    }
    for name, values in found.items():
        check_integers(name, values)
    size = vocabulary_size(causal_lm.backbone)
    check_id_range(found["token_ids"], size)
    return found["token_ids"], found.get("anchors")


def check_row_fits(shape, fixed_shape):
    """Raises a `ValueError` if a batch is larger than the first one was."""
    if shape[0] > fixed_shape[0] or shape[1] > fixed_shape[1]:
        raise ValueError(
            "Expected no batch to be larger than the first, of shape [B, T] = "
            f"{list(fixed_shape)}, because one compiled step serves all. Received: a "
            f"batch of shape {list(shape)}. Pad all batches to one length."
        )


def check_same_keys(rows, expected):
    """Raises a `ValueError` if a batch has other entries than the first one."""
    if set(rows) != set(expected):
        raise ValueError(
            f"Expected every batch to have the entries of the first, "
            f"{sorted(expected)}. Received: {sorted(rows)}. Give all or none."
        )


def _from_dict(x):
    unknown = sorted(map(str, set(x) - set(DTYPES)))
    if unknown or x.get("token_ids") is None:
        raise ValueError(
            "Expected a dict with 'token_ids' and optionally "
            f"{', '.join(repr(name) for name in list(DTYPES)[1:])}. "
            f"Received: keys {sorted(str(k) for k in x if x[k] is not None)}. Leave "
            "other entries out."
        )
    rows = {name: _array(name, x[name]) for name in DTYPES if x.get(name) is not None}
    if "padding_mask" not in rows:
        # Segment 0 is what packing leaves empty.
        rows["padding_mask"] = (
            rows["segment_ids"] > 0
            if "segment_ids" in rows
            else np.ones(rows["token_ids"].shape, dtype=bool)
        )
    return rows


def _array(name, values):
    try:
        values = to_numpy(values)
    except ValueError as error:
        raise ValueError(
            f"Expected `{name}` to be an array. Received: rows of unequal lengths. Pad "
            "them, or pass a list of documents alone."
        ) from error
    if values.dtype.kind not in "biufc" or not values.ndim:
        raise TypeError(
            f"Expected `{name}` to be an array of numbers. Received: an array of shape "
            f"{list(values.shape)} and dtype {values.dtype}. Pass token ids alone in a "
            "dict; texts are a list."
        )
    if name in FLAGS and values.dtype != bool:
        # Zeros and ones of any kind of number; NaN is neither.
        if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
            wrong = values[~np.isin(values, (0, 1))]
            raise ValueError(
                f"Expected `{name}` of zeros and ones, or booleans. Received: "
                f"{wrong.ravel()[:1].tolist()} in an array of dtype {values.dtype}."
            )
        values = values.astype(bool)
    return values


def _check_token_ids(token_ids, causal_lm):
    if token_ids.dtype.kind not in "iu":
        raise TypeError(
            "Expected token ids to be integers. Received: an array of dtype "
            f"{token_ids.dtype}. Pass the tokenizer's ids, or strings."
        )
    if token_ids.ndim != 2:
        raise ValueError(
            "Expected token ids of shape [documents, tokens]. Received: shape "
            f"{token_ids.shape}. Add or remove an axis."
        )
    check_id_range(token_ids, vocabulary_size(causal_lm.backbone))
    limit = maximum_length(causal_lm)
    if limit is not None and token_ids.shape[1] > limit:
        raise ValueError(
            f"Expected documents of at most {limit} tokens, the model's learned "
            f"positions. Received: {token_ids.shape[1]} tokens. Cut the documents."
        )


def _check_masks(rows):
    expected = rows["token_ids"].shape
    for name in ("padding_mask", "segment_ids", "answer_mask"):
        if name in rows and rows[name].shape != expected:
            raise ValueError(
                f"Expected `{name}` of the shape of `token_ids`, {expected}. "
                f"Received: {rows[name].shape}."
            )
    if "segment_ids" in rows:
        _check_segments(rows["segment_ids"])
    mask = rows["padding_mask"]
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "Expected documents padded on the right: a `padding_mask` of ones and "
            "then zeros in each row. Received: a row with a zero before a one. Move "
            "the padding to the end."
        )


def _check_segments(segment_ids):
    check_integers("segment_ids", segment_ids)
    if segment_ids.size and (
        segment_ids.min() < 0 or segment_ids.max() > MOST_SEGMENTS
    ):
        raise ValueError(
            f"Expected `segment_ids` from 0, padding, to {MOST_SEGMENTS}. Received: "
            f"numbers from {segment_ids.min()} to {segment_ids.max()}. Number the "
            "documents of each row 1, 2, ..."
        )


def check_anchors(anchors, shape):
    """Checks where blocks of documents stand.

    Args:
        anchors: array `[B, K]`.
        shape: `[B, T]` of the documents.

    Raises:
        TypeError: for anchors that are not integers.
        ValueError: for a wrong shape, or places outside the documents.
    """
    check_integers("anchors", anchors)
    documents, length = shape
    if anchors.ndim != 2 or anchors.shape[0] != documents or not anchors.shape[1]:
        raise ValueError(
            f"Expected `anchors` of shape [documents, blocks] = [{documents}, K]. "
            f"Received: shape {list(anchors.shape)}."
        )
    outside = (anchors != -1) & ((anchors < 1) | (anchors >= length))
    if outside.any():
        raise ValueError(
            f"Expected `anchors` from 1 to {length - 1}, how many tokens a block sees, "
            f"or -1 for none. Received: {anchors[outside][0]}."
        )
