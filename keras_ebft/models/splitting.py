"""How texts are split into words before byte pairs are merged.

Merges were learned from words split in one way; split otherwise, a text becomes
other tokens than the model has seen. GGUF files name the way in
`tokenizer.ggml.pre`; KerasHub's tokenizers split all texts as Llama 3 does.
"""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# By the name in the file, a way of splitting.
WAYS = {
    "gpt-2": "gpt-2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}


def way_of(name):
    """The way of splitting that a file's `tokenizer.ggml.pre` means.

    Raises:
        ValueError: for a name that is not known here.
    """
    if name not in WAYS:
        raise ValueError(
            f"Expected a byte-pair tokenizer of one of the kinds {', '.join(WAYS)}. "
            f"Received: {name!r}. Other kinds split words in ways not known here."
        )
    return WAYS[name]


def split_as(tokenizer, way):
    """Makes a byte-pair tokenizer split texts in a given way.

    Args:
        tokenizer: `tokenizers.Tokenizer`, changed in place.
        way: one of the values of `WAYS`.
    """
    from tokenizers import normalizers

    tokenizer.pre_tokenizer = _pre_tokenizer(way)
    if way == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if way == "llama3":
        # Words that are tokens stay whole, whatever the merges say.
        tokenizer.model.ignore_merges = True


def _pre_tokenizer(way):
    from tokenizers import Regex, pre_tokenizers

    if way in ("gpt-2", "digits"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if way == "gpt-2":
            return words
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, words])
    pattern = {"llama3": LLAMA3, "qwen2": QWEN2}[way]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
