"""A tiny model of every family with the tokenizer and preprocessor of its presets."""

import io

import keras_hub
import sentencepiece
import tokenizers
from helpers import family

TEXTS = ("def f(x): return", "abab abab ab")
LENGTH = 24

BYTE_PAIRS = (
    "Bloom",
    "Falcon",
    "GPT2",
    "GPTNeoX",
    "GptOss",
    "Llama3",
    "OPT",
    "Qwen",
    "Qwen3",
    "Qwen3Moe",
    "Qwen3_5",
    "Qwen3_5Moe",
    "QwenMoe",
    "SmolLM3",
)
SENTENCE_PIECES = {
    # Start, end and padding.
    "Gemma": ("<bos>", "<eos>", "<pad>"),
    "Gemma2": ("<bos>", "<eos>", "<pad>"),
    "Gemma3": ("<bos>", "<eos>", "<pad>"),
    "Gemma3n": ("<bos>", "<eos>", "<pad>"),
    "Gemma4": ("<bos>", "<eos>", "<pad>"),
    "Llama": ("<s>", "</s>", "<pad>"),
    "Mistral": ("<s>", "</s>", "<pad>"),
    "Mixtral": ("<s>", "</s>", "<pad>"),
    "Phi3": ("<s>", "<|endoftext|>", "<pad>"),
}
# Models of one class, told apart by their settings.
PREFIXES = {"Gemma2": "Gemma"}
FAMILIES = tuple(
    name for name in (*BYTE_PAIRS, *SENTENCE_PIECES, "RWKV7") if name not in PREFIXES
)
WITHOUT_IMAGES = {
    "Gemma3": {"has_vision_tokens": False},
    "Gemma4": {"has_vision_tokens": False, "has_video_tokens": False},
    "Qwen3_5": {"has_vision_tokens": False},
    "Qwen3_5Moe": {"has_vision_tokens": False},
}
MARKERS = (
    "<pad>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<think>",
    "</think>",
)
# Gemma 3n's tokenizer knows these whatever the model.
GEMMA_MARKERS = (
    "<image_soft_token>",
    "<audio_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
    "<start_of_audio>",
    "<end_of_audio>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<mask>",
    "[multimodal]",
)


def text_model(name, **changes):
    """A tiny randomised `CausalLM` that reads strings of up to `LENGTH` tokens."""
    tokenizer = make_tokenizer(name)
    size = tokenizer.vocabulary_size()
    if name == "Gemma3n":
        sizes = {"text_vocab_size": size, "vocab_size_per_layer_input": size}
    else:
        sizes = {"vocabulary_size": size}
    if name in ("Qwen", "QwenMoe"):
        # KerasHub's compiled `generate` asks a symbolic tensor for its truth where
        # there are windows and no fused attention.
        sizes["use_sliding_window_attention"] = False
    causal_lm = family(name, **{**sizes, **changes})
    prefix = PREFIXES.get(name, name)
    preprocessor_class = getattr(keras_hub.models, f"{prefix}CausalLMPreprocessor")
    preprocessor = preprocessor_class(tokenizer, sequence_length=LENGTH)
    return type(causal_lm)(backbone=causal_lm.backbone, preprocessor=preprocessor)


def make_tokenizer(name):
    """The tokenizer of a family, with bytes or letters as tokens."""
    if name == "RWKV7":
        # Its first id is padding, which no text says.
        letters = ["", *(chr(code) for code in range(32, 127))]
        lines = [f"{i} {c!r} {len(c)}" for i, c in enumerate(letters)]
        return keras_hub.models.RWKVTokenizer(lines)
    prefix = PREFIXES.get(name, name)
    tokenizer_class = getattr(keras_hub.models, f"{prefix}Tokenizer")
    options = WITHOUT_IMAGES.get(name, {})
    if name in BYTE_PAIRS:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokens = [*MARKERS, *alphabet, "ab"]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return tokenizer_class(vocabulary=vocabulary, merges=["a b"], **options)
    start, end, padding = SENTENCE_PIECES[name]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=file,
        model_type="char",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece=padding,
        eos_piece=end,
        bos_piece=start,
        user_defined_symbols=list(GEMMA_MARKERS),
        # As in the families' own.
        add_dummy_prefix=not name.startswith("Gemma"),
        minloglevel=2,
    )
    return tokenizer_class(proto=file.getvalue(), **options)
