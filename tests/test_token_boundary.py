"""A prompt ends where a token of the whole text does."""

import keras_hub
import pytest
from text_models import make_tokenizer

from keras_ebft.data import at_token_boundary

pytestmark = pytest.mark.backend_independent
MERGES = ["Ċ Ġ", "ĊĠ Ġ", "Ġ b", "Ċ ab", "a b", "Ã ¤"]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, a line's end with blanks after it, a word with a blank before."""
    letters = ["a", "b", "c", "Ċ", "Ġ", "Ã", "¤", "¶"]
    merged = [merge.replace(" ", "") for merge in MERGES]
    vocabulary = {token: i for i, token in enumerate([*letters, *merged])}
    return keras_hub.tokenizers.BytePairTokenizer(vocabulary, merges=MERGES)


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        # The last blank belongs to the word.
        ("ab\n", "   b", ("ab\n  ", " b")),
        ("ab\n", "c", ("ab\n", "c")),
        ("", "ab", ("", "ab")),
        # A letter of two bytes that are tokens of their own stays whole.
        ("a", "ö", ("a", "ö")),
        ("c", "ä", ("c", "ä")),
        # Nothing would be left of the answer.
        ("a", "b", ("a", "b")),
        ("ab", "", ("ab", "")),
    ],
)
def test_by_hand(tokenizer, prompt, answer, expected):
    assert at_token_boundary(prompt, answer, tokenizer) == expected


def test_apart_they_are_the_tokens_of_the_whole(tokenizer):
    def tokens(*texts):
        return [int(token) for text in texts for token in tokenizer(text)]

    pair = "cab\n", "   b\n  c"
    assert tokens(*pair) != tokens("".join(pair))
    moved = at_token_boundary(*pair, tokenizer)
    assert "".join(moved) == "".join(pair)
    assert tokens(*moved) == tokens("".join(pair))


@pytest.mark.parametrize("name", ["Gemma", "Llama", "RWKV7"])
def test_tokens_of_single_letters_move_nothing(name):
    pair = "ab c", "  d e"
    assert at_token_boundary(*pair, make_tokenizer(name)) == pair


@pytest.mark.parametrize("pair", [(1, "a"), ("a", None)])
def test_other_types_are_refused(pair, tokenizer):
    with pytest.raises(TypeError, match=r"Expected `(prompt|answer)` to be a str"):
        at_token_boundary(*pair, tokenizer)
