"""Documents of any accepted form as checked arrays of token ids."""

import numpy as np

from keras_ebft import bridge

KEYS = ("token_ids", "padding_mask")


def to_token_rows(x, causal_lm, trim=True):
    """Documents as token ids and padding mask.

    Args:
        x: list or array of strings; an integer array `[N, T]` of token ids; or a
            dict with `token_ids` and optionally `padding_mask`, both `[N, T]`,
            padded on the right.
        causal_lm: the `CausalLM` the documents are for; its preprocessor reads
            strings.
        trim: bool, whether rows of strings end with the longest document rather
            than at the preprocessor's `sequence_length`.

    Returns:
        dict of `token_ids` int32 `[N, T]` and `padding_mask` bool `[N, T]`.

    Raises:
        TypeError: for token ids that are not integers.
        ValueError: for a wrong rank, ids outside the vocabulary, a mask that does
            not fit or has gaps, unknown keys, documents beyond the model's
            learned positions, or strings without a preprocessor.
    """
    if isinstance(x, dict):
        rows = _from_dict(x)
    else:
        values = _to_numpy(x)
        if values.dtype.kind in "OSU":
            rows = _from_strings(values, causal_lm, trim)
        else:
            rows = _from_dict({"token_ids": values})
    _check_token_ids(rows["token_ids"], causal_lm)
    rows["token_ids"] = rows["token_ids"].astype("int32")
    _check_padding_mask(rows)
    return rows


def check_row_fits(shape, fixed_shape):
    """Raises a `ValueError` if a batch is larger than the first one was."""
    if shape[0] > fixed_shape[0] or shape[1] > fixed_shape[1]:
        raise ValueError(
            "Expected no batch to be larger than the first, of shape [B, T] = "
            f"{list(fixed_shape)}, because one compiled step serves all. Received: a "
            f"batch of shape {list(shape)}. Pad all batches to one length."
        )


def _from_dict(x):
    unknown = sorted(set(x) - set(KEYS))
    if unknown or "token_ids" not in x:
        raise ValueError(
            f"Expected a dict with 'token_ids' and optionally 'padding_mask'. "
            f"Received: keys {sorted(x)}. Leave other entries out."
        )
    token_ids = _to_numpy(x["token_ids"])
    mask = x.get("padding_mask")
    mask = np.ones(token_ids.shape) if mask is None else _to_numpy(mask)
    return {"token_ids": token_ids, "padding_mask": mask.astype(bool)}


def _from_strings(texts, causal_lm, trim):
    preprocessor = causal_lm.preprocessor
    if preprocessor is None:
        raise ValueError(
            "Expected token ids, because this CausalLM has no preprocessor to read "
            "strings with. Received: strings. Build the CausalLM with "
            "`preprocessor=`, or pass {'token_ids': ..., 'padding_mask': ...}."
        )
    texts = [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in texts]
    # The preprocessor splits T tokens into T-1 inputs and T-1 shifted labels.
    inputs, labels, weights = preprocessor(
        texts, sequence_length=preprocessor.sequence_length - 1
    )
    inputs, labels, weights = (
        {name: _to_numpy(value) for name, value in inputs.items()},
        _to_numpy(labels),
        _to_numpy(weights),
    )
    token_ids = np.concatenate([inputs["token_ids"], labels[:, -1:]], axis=1)
    mask = np.concatenate([inputs["padding_mask"], weights[:, -1:]], axis=1)
    mask = mask.astype(bool)
    if trim:
        longest = max(int(mask.sum(axis=1).max()), 1)
        token_ids, mask = token_ids[:, :longest], mask[:, :longest]
    return {"token_ids": token_ids, "padding_mask": mask}


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
    size = bridge.vocabulary_size(causal_lm.backbone)
    if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= size):
        raise ValueError(
            f"Expected token ids from 0 to {size - 1}, the model's vocabulary. "
            f"Received: ids from {token_ids.min()} to {token_ids.max()}. Use the "
            "tokenizer the model was trained with."
        )
    limit = bridge.maximum_length(causal_lm)
    if limit is not None and token_ids.shape[1] > limit:
        raise ValueError(
            f"Expected documents of at most {limit} tokens, the model's learned "
            f"positions. Received: {token_ids.shape[1]} tokens. Cut the documents."
        )


def _check_padding_mask(rows):
    mask = rows["padding_mask"]
    if mask.shape != rows["token_ids"].shape:
        raise ValueError(
            f"Expected `padding_mask` of the shape of `token_ids`, "
            f"{rows['token_ids'].shape}. Received: {mask.shape}."
        )
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "Expected documents padded on the right: a `padding_mask` of ones and "
            "then zeros in each row. Received: a row with a zero before a one. Move "
            "the padding to the end."
        )


def _to_numpy(value):
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)
