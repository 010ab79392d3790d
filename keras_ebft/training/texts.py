"""Documents in memory, one by one: which they are, and rows of their tokens."""

import numbers
from collections.abc import Iterable

import numpy as np

from keras_ebft.data.documents import DocumentTokenizer
from keras_ebft.networks import text_markers, to_numpy


def is_sequence(x):
    """Whether `x` is documents in memory that are read one by one, and no batches.

    A column of a data set is; a list, an array and a dict are documents too, but
    known by their type.
    """
    if not (hasattr(x, "__len__") and hasattr(x, "__getitem__")):
        return False
    try:
        first = x[0]
    except (KeyError, IndexError, TypeError, NotImplementedError):
        return False
    return isinstance(first, (str, bytes)) or _is_pair(first)


def listed(x):
    """Documents as a list, `None` if `x` is one array of token ids.

    Args:
        x: list, array or other sequence of strings, bytes, pairs of them, or token
            ids.

    Raises:
        TypeError: for a single string, or what is no collection.
        ValueError: for strings in more dimensions than one.
    """
    if isinstance(x, (str, bytes)):
        raise TypeError(
            f"Expected several documents. Received: one, {x[:40]!r}. Pass a list, and "
            "from a generator lists of several."
        )
    if hasattr(x, "dtype"):
        values = to_numpy(x)
        return _strings(values) if values.dtype.kind in "OSU" else None
    if not isinstance(x, Iterable):
        raise TypeError(
            "Expected documents: a list of strings, pairs or vectors of token ids, an "
            "array of token ids, or a dict with 'token_ids'. Received: "
            f"{x!r} (of type {type(x).__name__})."
        )
    documents = list(x)
    if any(isinstance(d, (str, bytes)) or _is_pair(d) for d in documents):
        return documents
    try:
        values = np.asarray([to_numpy(document) for document in documents])
    except ValueError:
        # Of unequal lengths.
        return documents
    return documents if values.dtype.kind == "O" or not documents else None


def _strings(values):
    """The documents of an array of strings or objects."""
    if values.ndim == 1 or values.shape[1:] == (1,):
        return values.ravel().tolist()
    if values.size and isinstance(values.flat[0], (str, bytes)):
        raise ValueError(
            "Expected strings of shape [documents]. Received: an array of shape "
            f"{list(values.shape)}. Pass pairs of prompt and answer as a list of "
            "tuples."
        )
    return list(values)


def _is_pair(document):
    """Whether a document is a tuple of prompt and answer, and not of token ids."""
    return isinstance(document, tuple) and not all(
        isinstance(part, numbers.Number) for part in document
    )


def rows_of_documents(documents, causal_lm, trim):
    """Documents as rows, each padded on the right.

    Args:
        documents: list of strings, bytes, vectors of token ids, or pairs of these.
        causal_lm: the `CausalLM` the documents are for; its preprocessor says which
            markers go around texts and how long rows may be.
        trim: bool, whether rows end with the longest document rather than at the
            preprocessor's `sequence_length`.

    Returns:
        `(rows, lost)`: dict of arrays `[N, T]`, with an `answer_mask` if there are
        pairs, and int array `[N]`, tokens that a row had no room for. What is cut
        has no end token. A document without tokens, or whose answer has none, is
        a row of padding.

    Raises:
        TypeError: for a document of another kind.
        ValueError: for strings without a preprocessor.
    """
    read = list(_tokenizer(documents, causal_lm)(documents))
    read = [(np.zeros(0, "int32"), 0) if one is None else one for one in read]
    sizes = np.array([len(ids) for ids, _ in read])
    longest = int(sizes.max(initial=1))
    has_texts = any(map(_has_text, documents))
    limit = causal_lm.preprocessor.sequence_length if has_texts else longest
    length = limit if has_texts and not trim else min(longest, limit)
    shape = (len(read), max(length, 1))
    token_ids, answers = np.zeros(shape, "int32"), np.zeros(shape, bool)
    for row, (ids, start) in enumerate(read):
        end = min(len(ids), length)
        token_ids[row, :end] = ids[:end]
        answers[row, start:end] = True
    mask = np.arange(shape[1]) < np.minimum(sizes, length)[:, None]
    rows = {"token_ids": token_ids, "padding_mask": mask}
    if any(map(_is_pair, documents)):
        rows["answer_mask"] = answers
    return rows, np.maximum(sizes - length, 0)


def _tokenizer(documents, causal_lm):
    if not any(map(_has_text, documents)):
        return DocumentTokenizer(None, special_tokens=False)
    preprocessor = causal_lm.preprocessor
    if preprocessor is None:
        raise ValueError(
            "Expected token ids, because this CausalLM has no preprocessor to read "
            "strings with. Received: strings. Build the CausalLM with "
            "`preprocessor=`, or pass {'token_ids': ..., 'padding_mask': ...}."
        )
    markers = text_markers(preprocessor)
    return DocumentTokenizer(preprocessor.tokenizer, True, markers)


def _has_text(document):
    parts = document if isinstance(document, tuple) else (document,)
    return any(isinstance(part, (str, bytes)) for part in parts)
