"""A GGUF file as a KerasHub model."""

import os
from typing import Any

import keras
import keras_hub

from keras_ebft.models.gguf import GGUFFile
from keras_ebft.models.llama import (
    Llama3Backbone,
    Llama3CausalLM,
    Llama3CausalLMPreprocessor,
    Llama3Tokenizer,
)
from keras_ebft.models.qwen import QwenTokenizer
from keras_ebft.models.rotary import LLAMA3_SCALING, rotary_settings
from keras_ebft.models.splitting import way_of
from keras_ebft.models.weights import load_weights
from keras_ebft.validation import check_int

ARCHITECTURES = ("llama", "qwen2")
# Values of `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED = 3, 4


def from_gguf(
    path: str | os.PathLike[str],
    dtype: str | keras.DTypePolicy | None = None,
    sequence_length: int = 1024,
) -> keras_hub.models.CausalLM:
    """A language model out of a GGUF file, with tokenizer and chat template.

    Files of the architectures "llama" (Llama 3, SmolLM2 and others) and "qwen2"
    (Qwen 2, Qwen 2.5) are read, in any type of number that the package `gguf`
    dequantizes; the weights of the model are floats.

    Args:
        path: the file.
        dtype: Keras dtype policy or its name; by default Keras' own.
        sequence_length: int, tokens per text of the preprocessor.

    Returns:
        `keras_hub.models.CausalLM` with a preprocessor. Its tokenizer has the
        file's `chat_template`, for `keras_ebft.models.chat_template`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the package `gguf` is not installed.
        ValueError: for other architectures, and for models of these that KerasHub
            has no setting for.

    Example:
    ```python
    causal_lm = keras_ebft.models.from_gguf("model-Q4_K_M.gguf")
    model = keras_ebft.EBFTModel(causal_lm)
    ```
    """
    sequence_length = check_int("sequence_length", sequence_length, 2)
    file = GGUFFile(path)
    if file.architecture not in ARCHITECTURES:
        raise ValueError(
            f"Expected a file of the architecture {' or '.join(ARCHITECTURES)}. "
            f"Received: {file.path}, which is {file.architecture!r}. Load the model "
            "with keras_hub.models.CausalLM.from_preset() instead."
        )
    settings = tokenizer_settings(file)
    backbone = _backbone(file, dtype)
    options = {"sequence_length": sequence_length}
    options["add_start_token"] = settings["start_token"] is not None
    if file.architecture == "llama":
        tokenizer = Llama3Tokenizer(**settings)
        preprocessor = Llama3CausalLMPreprocessor(tokenizer, **options)
        return Llama3CausalLM(backbone, preprocessor=preprocessor)
    tokenizer = QwenTokenizer(**settings)
    preprocessor = keras_hub.models.QwenCausalLMPreprocessor(tokenizer, **options)
    return keras_hub.models.QwenCausalLM(backbone, preprocessor=preprocessor)


def _backbone(
    file: GGUFFile, dtype: str | keras.DTypePolicy | None
) -> keras_hub.models.Backbone:
    is_llama = file.architecture == "llama"
    sizes = _sizes(file)
    head_dim = sizes["hidden_dim"] // sizes["num_query_heads"]
    _check_heads(file, head_dim)
    theta, linear, llama3 = rotary_settings(file, head_dim)
    settings = {
        **sizes,
        "rope_max_wavelength": theta,
        "layer_norm_epsilon": _epsilon(file),
        "tie_word_embeddings": not file.has("output.weight"),
        "dtype": dtype,
    }
    if is_llama:
        backbone = Llama3Backbone(
            rope_position_scaling_factor=linear, **_llama3(llama3), **settings
        )
    else:
        backbone = keras_hub.models.QwenBackbone(rope_scaling_factor=linear, **settings)
    load_weights(backbone, file, interleaved=is_llama)
    file.check_all_read()
    return backbone


def _sizes(file: GGUFFile) -> dict[str, int]:
    heads = file.setting("{arch}.attention.head_count")
    return {
        "vocabulary_size": file.shape("token_embd.weight")[0],
        "num_layers": file.setting("{arch}.block_count"),
        "num_query_heads": heads,
        "num_key_value_heads": file.setting("{arch}.attention.head_count_kv", heads),
        "hidden_dim": file.setting("{arch}.embedding_length"),
        "intermediate_dim": file.setting("{arch}.feed_forward_length"),
    }


def _epsilon(file: GGUFFile) -> float:
    # Written in single precision: 1e-5 comes back as 9.99999975e-06.
    value = file.setting("{arch}.attention.layer_norm_rms_epsilon")
    return float(f"{value:.6g}")


def _llama3(factor: float | None) -> dict[str, Any]:
    if factor is None:
        return {}
    low, high, length = LLAMA3_SCALING
    return {
        "rope_frequency_adjustment_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_pretraining_sequence_length": length,
    }


def _check_heads(file: GGUFFile, head_dim: int) -> None:
    widths = [
        file.setting(f"{{arch}}.attention.{kind}_length", head_dim)
        for kind in ("key", "value")
    ]
    experts = file.setting("{arch}.expert_count", 0)
    if experts or widths != [head_dim, head_dim]:
        what = f"{experts} experts" if experts else f"heads of {widths[0]}"
        raise ValueError(
            f"Expected a {file.architecture} model of dense layers whose heads share "
            f"the width of the model, {head_dim} each. Received: {file.path} with "
            f"{what}. KerasHub's model has no setting for that."
        )


def tokenizer_settings(file: GGUFFile) -> dict[str, Any]:
    """What a byte-pair tokenizer is made of, out of a `GGUFFile`.

    Raises:
        ValueError: for a tokenizer of another kind.
    """
    kind = file.setting("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            "Expected a byte-pair tokenizer, which GGUF calls 'gpt2'. Received: "
            f"{file.path} with one of the kind {kind!r}. Load the model with "
            "keras_hub.models.CausalLM.from_preset() instead."
        )
    tokens = file.setting("tokenizer.ggml.tokens")
    types = file.setting("tokenizer.ggml.token_type", [1] * len(tokens))
    way = way_of(file.setting("tokenizer.ggml.pre"))

    def named(name: str) -> str | None:
        index = file.setting(f"tokenizer.ggml.{name}_token_id", None)
        return None if index is None else tokens[index]

    control = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    whole = [token for token, kind in zip(tokens, types) if kind == USER_DEFINED]
    begins = file.setting("tokenizer.ggml.add_bos_token", way == "llama3")
    end = tokens[file.setting("tokenizer.ggml.eos_token_id")]
    second = named("eot")
    return {
        "vocabulary": {token: index for index, token in enumerate(tokens)},
        "merges": file.setting("tokenizer.ggml.merges"),
        "way": way,
        "start_token": named("bos") if begins else None,
        "end_token": end,
        "end_token2": None if second == end else second,
        "bos_token": named("bos"),
        "special_tokens": control,
        "unsplittable_tokens": [*control, *whole],
        "chat_template": file.setting("tokenizer.chat_template", None),
    }
