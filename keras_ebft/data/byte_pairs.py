"""A small tokenizer trained on one's own texts, for models made from scratch."""

import json
from collections.abc import Iterable
from typing import Any

import keras_hub

from keras_ebft.validation import check_int

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def train_byte_pair_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """Trains a byte-level byte-pair encoding.

    Args:
        texts: iterable of strings.
        vocabulary_size: int, all byte values and five special tokens included.

    Returns:
        `keras_hub.models.Llama3Tokenizer` of at most `vocabulary_size` tokens.

    Raises:
        ValueError: if the vocabulary cannot hold all bytes, special tokens and one
            pair, or the texts hold no pair.

    Example:
    ```python
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(texts, 2048)
    ```
    """
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS) + 1
    vocabulary_size = check_int("vocabulary_size", vocabulary_size, smallest)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    if not model["merges"]:
        raise ValueError(
            "Expected texts with at least one pair of bytes in a word. "
            "Received: texts without any. Pass more text."
        )
    vocabulary = dict(model["vocab"])
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in model["merges"]
    ]
    return keras_hub.models.Llama3Tokenizer(vocabulary=vocabulary, merges=merges)
