"""Where a prompt may end: where a token of prompt and answer together does."""

from typing import Any

from keras_ebft.data.documents import text_of
from keras_ebft.validation import check_instance

# Tokens at the end of a prompt that an answer may change.
MOST_REPLACED = 8


def at_token_boundary(prompt: str, answer: str, tokenizer: Any) -> tuple[str, str]:
    r"""Moves what an answer begins with to its prompt, up to where a token ends.

    Prompts and answers are tokenized apart. A prompt that ends within a token of the
    whole text ends with tokens that no text goes on after, and a model writes something
    else than an answer: byte-pair tokenizers, for one, read the end of a line and the
    next line's indentation but for its last blank as one token.

    Args:
        prompt: str.
        answer: str. Where it is not known, something it may begin with, such as
            `"    return"` for the body of a function.
        tokenizer: KerasHub tokenizer.

    Returns:
        `(prompt, answer)`, together the same text. As they were, where the answer has
        no token that ends within it.

    Raises:
        TypeError: if prompt or answer is no string.

    Example:
    >>> import keras_hub
    >>> vocabulary = {"a": 0, "\u010a\u0120": 1, "b": 2, "\u010a": 3, "\u0120": 4}
    >>> tokenizer = keras_hub.tokenizers.BytePairTokenizer(
    ...     vocabulary, merges=["\u010a \u0120"]
    ... )
    >>> at_token_boundary("a\n", "  b", tokenizer)
    ('a\n ', ' b')
    """
    for name, text in (("prompt", prompt), ("answer", answer)):
        check_instance(name, text, str, "Pass a string.")
    whole = prompt + answer
    token_ids = list(tokenizer(whole))
    # Tokens that end before the prompt does are the same with and without an answer,
    # but for the last ones.
    first = max(len(tokenizer(prompt)) - MOST_REPLACED, 0)
    for count in range(first, len(token_ids)):
        text = text_of(tokenizer, token_ids[:count])
        if whole.startswith(text) and len(prompt) <= len(text) < len(whole):
            return text, whole[len(text) :]
    return prompt, answer
