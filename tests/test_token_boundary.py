"""A prompt ends where a token of the whole text does."""

import keras_hub
import pytest
from text_models import make_tokenizer

from keras_ebft.data import at_token_boundary, documents

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


def warnings_of(pairs, tokenizer, caplog):
    caplog.clear()
    documents._looked_at.discard(id(tokenizer))
    for _ in range(2):
        list(documents.DocumentTokenizer(tokenizer, False)(pairs))
    return [record.message for record in caplog.records]


def test_prompts_that_end_within_a_token_are_said_once(tokenizer, caplog):
    cut, whole = ("ab\n", "   b"), ("ab\n  ", " b")
    (message,) = warnings_of([cut, whole, "ab", ([1], [2])], tokenizer, caplog)
    assert "1 of the first 2 pairs" in message
    assert "at_token_boundary" in message
    assert warnings_of([cut, whole, whole], tokenizer, caplog) == []
    assert warnings_of([("", "ab"), ("ab", ""), "ab"], tokenizer, caplog) == []


@pytest.mark.parametrize("name", ["Gemma", "Llama"])
def test_sentence_pieces_that_go_on_are_no_cut_tokens(name, caplog):
    """A blank that SentencePiece would put before an answer is none either."""
    pairs = [("ab c", "d e"), ("a", "b")]
    assert warnings_of(pairs, make_tokenizer(name), caplog) == []
