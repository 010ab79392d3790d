"""What `transformers` needs to continue a text as the model does here.

Which token begins a text and which end it, in the three places it is looked for: the
model's configuration, its settings for generation, and the tokenizer.
"""

import json

import keras_hub

from keras_ebft.networks import end_token_ids, tokenizer


def write_generation(causal_lm, folder):
    """Completes an exported folder.

    Args:
        causal_lm: `keras_hub.models.CausalLM` with a preprocessor.
        folder: path of a folder with `config.json` and, perhaps, a tokenizer.
    """
    known = tokenizer(causal_lm)
    ends = list(end_token_ids(causal_lm))
    token_ids = {
        "bos_token_id": getattr(known, "start_token_id", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    if getattr(known, "pad_token", None) is not None:
        # Elsewhere it is a number, 0, that may stand for a word.
        token_ids["pad_token_id"] = known.pad_token_id
    token_ids = {name: value for name, value in token_ids.items() if value is not None}
    _update(folder / "config.json", token_ids)
    (folder / "generation_config.json").write_text(json.dumps(token_ids, indent=2))
    if (folder / "tokenizer_config.json").exists():
        _write_start(causal_lm, folder)


def _write_start(causal_lm, folder):
    known, preprocessor = tokenizer(causal_lm), causal_lm.preprocessor
    start = getattr(known, "start_token_id", None)
    adds_start = start is not None and getattr(preprocessor, "add_start_token", False)
    _update(folder / "tokenizer_config.json", {"add_bos_token": adds_start})
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    # Fast tokenizers do not look at the setting, but do what stands here.
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}]
    specials = {}
    if adds_start:
        token = known.id_to_token(start)
        pieces.insert(0, {"SpecialToken": {"id": token, "type_id": 0}})
        specials[token] = {"id": token, "ids": [int(start)], "tokens": [token]}
    second = json.loads(json.dumps(pieces).replace('"A"', '"B"').replace(": 0", ": 1"))
    template = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, *second],
        "special_tokens": specials,
    }
    _update(path, {"post_processor": template})


def write_sentence_pieces(known, folder):
    """Writes a SentencePiece tokenizer as `transformers` reads Llama's.

    Args:
        known: `keras_hub.tokenizers.SentencePieceTokenizer`.
        folder: path of a folder.
    """
    known.save_assets(str(folder))
    (folder / "vocabulary.spm").rename(folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": known.start_token,
        "eos_token": known.end_token,
        "unk_token": known.id_to_token(known.token_to_id("<unk>")),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_byte_pairs(known, folder):
    """Writes a byte-pair tokenizer as `transformers` reads Qwen's.

    Args:
        known: `keras_hub.tokenizers.BytePairTokenizer`.
        folder: path of a folder.
    """
    known.save_assets(str(folder))
    (folder / "vocabulary.json").rename(folder / "vocab.json")
    config = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "bos_token": None,
        "eos_token": known.end_token,
        "pad_token": known.id_to_token(known.pad_token_id),
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def writer_of(known, layout):
    """The function that writes a tokenizer for which KerasHub has no layout.

    Args:
        known: KerasHub tokenizer.
        layout: str, name of the layout of the model.

    Returns:
        Function of the tokenizer and a folder, or `None`.
    """
    if layout == "llama" and isinstance(
        known, keras_hub.tokenizers.SentencePieceTokenizer
    ):
        return write_sentence_pieces
    if layout == "qwen3" and isinstance(known, keras_hub.tokenizers.BytePairTokenizer):
        return write_byte_pairs
    return None


def _update(path, entries):
    content = json.loads(path.read_text("utf-8"))
    text = json.dumps({**content, **entries}, indent=2, ensure_ascii=False)
    path.write_text(text, "utf-8")
