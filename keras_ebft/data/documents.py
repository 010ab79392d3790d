"""Documents of any accepted form as token ids, with the place their answer begins."""

import itertools
import logging
import math

import keras_hub
import numpy as np

from keras_ebft.validation import check_id_range

# Long enough to amortise a tokenizer's call, small enough to keep memory flat.
TEXTS_PER_CALL = 256
CHARACTERS_PER_CALL = 1_000_000
# One of them is a token that SentencePiece merges with nothing that follows.
BORDERS = ("\n", "|", ")", ".", ":", "x", "e", "a")


PAIRS_LOOKED_AT = 32
# Identities of tokenizers whose pairs have been looked at: not each can be hashed.
_looked_at = set()

logger = logging.getLogger("keras_ebft")


class DocumentTokenizer:
    """Turns documents into `(token_ids, answer_start)`.

    A document is a string (or UTF-8 bytes), a pair `(prompt, answer)` of strings,
    an int array of token ids, or a pair of int arrays. Both halves of a pair are
    tokenized on their own, so that no token straddles the border, and say together
    what the two strings do.

    Args:
        tokenizer: `keras_hub` tokenizer, or a function from a list of strings to
            a list of lists of token ids; `None` if all documents are token ids.
        special_tokens: bool, whether the tokenizer's start token goes before and
            its end token after each document, where it has them and they are not
            there already. The end token belongs to the answer.
        markers: `(before, after)`, tuples of token ids, in place of the tokenizer's.

    Raises:
        TypeError: if `tokenizer` cannot be called.
    """

    def __init__(self, tokenizer, special_tokens, markers=None):
        if tokenizer is not None and not callable(tokenizer):
            raise TypeError(
                "Expected `tokenizer` to be a keras_hub tokenizer, a function from a "
                "list of strings to a list of lists of token ids, or None. Received: "
                f"tokenizer={tokenizer!r} (of type {type(tokenizer).__name__})."
            )
        self.tokenizer = tokenizer
        self._before, self._after = (), ()
        if markers is not None:
            self._before, self._after = markers
        elif special_tokens:
            self._before = _token(tokenizer, "start_token_id")
            self._after = _token(tokenizer, "end_token_id")
        self._borders = borders(tokenizer)

    def __call__(self, documents):
        """Yields `(token_ids, answer_start)`, `None` for a document without tokens.

        Args:
            documents: iterable of documents.

        Raises:
            TypeError: for a document of another kind, or a tokenizer that does not
                return ints.
            ValueError: for a tokenizer that returns too few, bytes that are not UTF-8,
                strings without a tokenizer, or token ids below 0 or beyond what an
                int32 holds.
        """
        parts_of_each = (
            self._without_markers(_parts(document, index))
            for index, document in enumerate(documents)
        )
        for parts in _groups(parts_of_each):
            tokens_of_each = self._tokenize_parts(parts)
            self._warn_of_cut_tokens(parts, tokens_of_each)
            yield from map(self._join, tokens_of_each)

    def _tokenize_parts(self, parts):
        """Lists of token ids in place of each document's parts."""
        beginnings = iter(self._tokenize([p[0] for p in parts if _is_text(p[0])]))
        rest = [p[1] for p in parts if len(p) == 2 and _is_text(p[1])]
        continuations = iter(self._continue(rest))
        tokens_of_each = []
        for pair in parts:
            found = [next(beginnings) if _is_text(pair[0]) else pair[0]]
            if len(pair) == 2:
                is_text = _is_text(pair[1])
                found.append(next(continuations) if is_text else pair[1])
            tokens_of_each.append(found)
        return tokens_of_each

    def _warn_of_cut_tokens(self, parts, tokens_of_each):
        """Says once of a tokenizer if most prompts end within a token."""
        if id(self.tokenizer) in _looked_at:
            return
        texts = [
            ("".join(pair), tokens)
            for pair, tokens in zip(parts, tokens_of_each)
            if len(pair) == 2 and all(map(_is_text, pair)) and all(pair)
        ][:PAIRS_LOOKED_AT]
        if not texts:
            return
        _looked_at.add(id(self.tokenizer))
        wholes = self._tokenize([text for text, _ in texts])
        cut = sum(
            not np.array_equal(whole, np.concatenate(tokens))
            for whole, (_, tokens) in zip(wholes, texts)
        )
        if 2 * cut >= len(texts):
            logger.warning(
                "Prompts of %d of the first %d pairs end within a token of prompt and "
                "answer together, so answers are learned, and asked for, after tokens "
                "that no text goes on after. keras_ebft.data.at_token_boundary(prompt, "
                "answer, tokenizer) moves the boundary; see docs/data.md.",
                cut,
                len(texts),
            )

    def _without_markers(self, parts):
        """Texts without markers that are written out, which are added as tokens."""
        parts = list(parts)
        start = getattr(self.tokenizer, "start_token", None)
        end = getattr(self.tokenizer, "end_token", None)
        if self._before and start and _is_text(parts[0]):
            parts[0] = parts[0].removeprefix(start)
        if self._after and end and _is_text(parts[-1]):
            parts[-1] = parts[-1].removesuffix(end)
        return parts

    def _tokenize(self, texts):
        if not texts:
            return []
        if self.tokenizer is None:
            raise ValueError(
                "Expected token ids, because `tokenizer` is None. Received: a "
                f"string, {texts[0][:40]!r}. Pass a tokenizer."
            )
        tokens = self.tokenizer(texts)
        tokens = tokens.to_list() if hasattr(tokens, "to_list") else tokens
        found = [_tokens(ids) for ids in tokens]
        if len(found) != len(texts):
            raise ValueError(
                "Expected a tokenizer to return a list of ints for every text. "
                f"Received: {len(found)} for {len(texts)} texts. Take a list of "
                "strings, and return as many lists."
            )
        return found

    def _continue(self, texts):
        """Tokens of texts that go on where another ends.

        SentencePiece puts a blank before every text. Behind a border that is a token
        of its own it does not, and the border is taken away again.
        """
        found = self._tokenize(texts)
        left = [index for index, text in enumerate(texts) if text]
        for border, ids in self._borders:
            if not left:
                break
            longer = self._tokenize([border + texts[index] for index in left])
            mended = [tokens[: len(ids)].tolist() == ids for tokens in longer]
            for index, tokens, fits in zip(left, longer, mended):
                if fits:
                    found[index] = tokens[len(ids) :]
            left = [index for index, fits in zip(left, mended) if not fits]
        return found

    def _join(self, parts):
        *prompt, answer = parts
        # An answer without tokens leaves nothing to learn.
        if not len(answer):
            return None
        whole = np.concatenate([*prompt, answer])
        before = () if _begins(whole, self._before) else self._before
        after = () if _begins(answer[::-1], self._after[::-1]) else self._after
        start = len(before) + len(prompt[0]) if prompt else 0
        if before or after:
            whole = np.concatenate([before, whole, after])
        return whole.astype("int32", copy=False), start


def _token(tokenizer, name):
    token = getattr(tokenizer, name, None)
    return () if token is None else (token,)


def _begins(ids, marker):
    return bool(marker) and tuple(ids[: len(marker)]) == tuple(marker)


def text_of(tokenizer, token_ids):
    """The text of token ids, a string."""
    ids = [int(token) for token in token_ids]
    # In a batch of one: RWKV-7's tokenizer reads nothing else.
    return tokenizer.detokenize([ids])[0] if ids else ""


def borders(tokenizer):
    """`(text, its token ids)` of the borders that a tokenizer needs and can write.

    SentencePiece alone does, for which a text that goes on from another is not what it
    is by itself.
    """
    if not isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        return []
    found = []
    for border in BORDERS:
        ids = [int(token) for token in tokenizer([border])[0]]
        if ids and text_of(tokenizer, ids) == border:
            found.append((border, ids))
    return found


def _is_text(part):
    return isinstance(part, str)


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
        # Also of a subclass, such as NumPy's, without what it adds.
        return str(part)
    if isinstance(part, bytes):
        try:
            return part.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Expected documents in UTF-8. Received: document {index}, {error}. "
                "Convert it, or leave it out."
            ) from error
    ids = _vector(part)
    if ids is None or (ids.dtype.kind not in "iu" and ids.size):
        raise TypeError(
            "Expected a document to be strings or token ids: a string, a pair "
            "(prompt, answer), or a vector of ints. Received: document "
            f"{index}, {' '.join(repr(part).split())[:60]} (of type "
            f"{type(part).__name__}). Leave out what is missing; "
            "keras_ebft.data.from_records reads records with named columns, "
            "keras_ebft.data.ChatTemplate messages."
        )
    return _as_int32(ids)


def _tokens(ids):
    """What a tokenizer made of a text."""
    found = _vector(ids)
    if found is None or (found.dtype.kind not in "iu" and found.size):
        raise TypeError(
            "Expected a tokenizer to return a list of ints for every text. Received: "
            f"{' '.join(repr(ids).split())[:60]} for one. Return their ids."
        )
    return _as_int32(found)


def _as_int32(ids):
    if ids.dtype != "int32":
        check_id_range(ids)
    return ids.astype("int32", copy=False)


def _vector(part):
    """A vector, `None` of what is none."""
    try:
        ids = np.asarray(part)
    except ValueError:
        return None
    return ids if ids.ndim == 1 else None


def is_missing(value):
    """Whether a value of a table says that there is none: `None`, NaN, pandas' NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and math.isnan(value)


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
