"""Strings as token ids, by way of a model's own preprocessor."""

import numpy as np

from keras_ebft.data.documents import borders, text_of
from keras_ebft.networks.families import family_of_preprocessor

# Shows what a preprocessor puts around a text, and how long a row that takes.
PROBE = "a"
PROBE_LENGTH = 16


def text_markers(preprocessor):
    """The tokens that a preprocessor puts before and after a text.

    Args:
        preprocessor: `keras_hub.models.CausalLMPreprocessor`.

    Returns:
        `(before, after)`, tuples of ints.

    Raises:
        ValueError: for a preprocessor that does more than that.
    """
    token_ids, mask = _preprocess(preprocessor, [PROBE], PROBE_LENGTH)
    whole = token_ids[0][mask[0]].tolist()
    text = to_numpy(preprocessor.tokenizer([PROBE])[0]).tolist()
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return tuple(whole[:start]), tuple(whole[start + len(text) :])
    raise ValueError(
        "Expected a preprocessor that tokenizes a text and puts markers before and "
        f"after it. Received: a {type(preprocessor).__name__} that makes {whole} of "
        f"{PROBE!r}, whose tokens are {text}. Pass token ids: "
        "{'token_ids': ..., 'padding_mask': ...}."
    )


def _preprocess(preprocessor, texts, length):
    """Token ids and mask `[N, length]` of texts, real tokens on the left."""
    x, family = texts, family_of_preprocessor(preprocessor)
    if family is not None and family.prompts_apart:
        x = {"prompts": [""] * len(texts), "responses": texts}
    # The preprocessor splits T tokens into T-1 inputs and T-1 shifted labels.
    inputs, labels, weights = preprocessor(x, sequence_length=length - 1)
    token_ids = _joined(inputs["token_ids"], labels)
    mask = _joined(inputs["padding_mask"], weights).astype(bool)
    # RWKV-7's pads on the left.
    order = np.argsort(~mask, axis=1, kind="stable")
    return (
        np.take_along_axis(token_ids, order, axis=1),
        np.take_along_axis(mask, order, axis=1),
    )


def _joined(inputs, labels):
    inputs, labels = to_numpy(inputs), to_numpy(labels)
    return np.concatenate([inputs, labels[:, -1:]], axis=1)


def to_numpy(value):
    """A tensor of any framework, or anything like an array, as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


class TextDecoder:
    """The text of token ids, without what is no text.

    Left out are ids that the tokenizer does not know, which a backbone may have more
    of, where its embedding is padded, and markers of beginning and end.

    Args:
        tokenizer: KerasHub tokenizer. Asked when texts are read: in a model that is
            being loaded it is still empty.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._borders = None

    def __call__(self, token_ids, goes_on=False):
        """The text of token ids.

        Args:
            token_ids: iterable of ints.
            goes_on: bool, whether the text goes on where another ended, and keeps a
                blank that it begins with; SentencePiece takes it for its own.

        Returns:
            str.
        """
        size, markers = self.tokenizer.vocabulary_size(), self._markers()
        known = [int(t) for t in token_ids if 0 <= t < size and t not in markers]
        if not known:
            return ""
        for border, ids in self._border() if goes_on else ():
            return text_of(self.tokenizer, ids + known).removeprefix(border)
        return text_of(self.tokenizer, known)

    def _border(self):
        if self._borders is None:
            self._borders = borders(self.tokenizer)[:1]
        return self._borders

    def _markers(self):
        names = ("start_token_id", "end_token_id", "end_token2_id")
        return {getattr(self.tokenizer, name, None) for name in names}


def export_tokenizer(tokenizer, path):
    """Writes a tokenizer in the Hugging Face layout.

    Args:
        tokenizer: KerasHub tokenizer.
        path: folder.

    Returns:
        bool, whether KerasHub has a layout for it; if not, nothing is written.
    """
    from keras_hub.src.utils.transformers.export import hf_exporter

    if type(tokenizer).__name__ not in hf_exporter.MODEL_TOKENIZER_CONFIGS:
        return False
    hf_exporter.export_tokenizer(tokenizer, str(path))
    return True
