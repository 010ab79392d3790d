"""Documents of any accepted form as token ids, with the place their answer begins."""

import itertools

import numpy as np

# Long enough to amortise a tokenizer's call, small enough to keep memory flat.
TEXTS_PER_CALL = 256
CHARACTERS_PER_CALL = 1_000_000


class DocumentTokenizer:
    """Turns documents into `(token_ids, answer_start)`.

    A document is a string (or UTF-8 bytes), a pair `(prompt, answer)` of strings,
    an int array of token ids, or a pair of int arrays. Both halves of a pair are
    tokenized on their own, so that no token straddles the border.

    Args:
        tokenizer: `keras_hub` tokenizer, or a function from a list of strings to
            a list of lists of token ids; `None` if all documents are token ids.
        special_tokens: bool, whether the tokenizer's start token goes before and
            its end token after each document, where it has them. The end token
            belongs to the answer.
    """

    def __init__(self, tokenizer, special_tokens):
        self.tokenizer = tokenizer
        self._before, self._after = (), ()
        if special_tokens:
            self._before = _token(tokenizer, "start_token_id")
            self._after = _token(tokenizer, "end_token_id")

    def __call__(self, documents):
        """Yields `(token_ids, answer_start)`, `None` for a document without tokens.

        Args:
            documents: iterable of documents.

        Raises:
            TypeError: for a document of another kind.
            ValueError: for bytes that are not UTF-8, or strings without a
                tokenizer.
        """
        parts_of_each = (
            _parts(document, index) for index, document in enumerate(documents)
        )
        for parts in _groups(parts_of_each):
            texts = [p for pair in parts for p in pair if isinstance(p, str)]
            tokens = iter(self._tokenize(texts) if texts else ())
            for pair in parts:
                yield self._join(
                    [next(tokens) if isinstance(p, str) else p for p in pair]
                )

    def _tokenize(self, texts):
        if self.tokenizer is None:
            raise ValueError(
                "Expected token ids, because `tokenizer` is None. Received: a "
                f"string, {texts[0][:40]!r}. Pass a tokenizer."
            )
        tokens = self.tokenizer(texts)
        tokens = tokens.to_list() if hasattr(tokens, "to_list") else tokens
        return [np.asarray(ids, dtype="int32") for ids in tokens]

    def _join(self, parts):
        *prompt, answer = parts
        # An answer without tokens leaves nothing to learn.
        if not len(answer):
            return None
        start = len(self._before) + len(prompt[0]) if prompt else 0
        if prompt or self._before or self._after:
            answer = np.concatenate([self._before, *prompt, answer, self._after])
        return answer.astype("int32", copy=False), start


def _token(tokenizer, name):
    token = getattr(tokenizer, name, None)
    return () if token is None else (token,)


def _groups(parts_of_each):
    """Lists of documents' parts, each list for one call of a tokenizer."""
    group, characters = [], 0
    for parts in parts_of_each:
        group.append(parts)
        characters += sum(map(len, parts))
        if len(group) == TEXTS_PER_CALL or characters >= CHARACTERS_PER_CALL:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _parts(document, index):
    if not isinstance(document, tuple):
        return (_part(document, index),)
    if len(document) != 2:
        raise ValueError(
            f"Expected a pair (prompt, answer). Received: document {index}, a tuple "
            f"of {len(document)}. Pass pairs."
        )
    return [_part(part, index) for part in document]


def _part(part, index):
    if isinstance(part, str):
        return part
    if isinstance(part, bytes):
        try:
            return part.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Expected documents in UTF-8. Received: document {index}, {error}. "
                "Convert it, or leave it out."
            ) from error
    ids = np.asarray(part)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise TypeError(
            "Expected a document to be a string, a pair (prompt, answer), or a "
            f"vector of token ids. Received: document {index}, {type(part).__name__} "
            f"of shape {ids.shape} and dtype {ids.dtype}. Use "
            "keras_ebft.data.from_records for records with named columns."
        )
    return ids


def every_nth(documents, index, count, done):
    """Documents `index + done * count`, `index + (done + 1) * count`, ...

    Args:
        documents: sequence, iterable, or function that returns an iterator.
        index: int, which shard.
        count: int, number of shards.
        done: int, documents of this shard to leave out.
    """
    documents = documents() if callable(documents) else documents
    first = index + done * count
    if hasattr(documents, "__getitem__") and hasattr(documents, "__len__"):
        return (documents[place] for place in range(first, len(documents), count))
    return itertools.islice(iter(documents), first, None, count)
