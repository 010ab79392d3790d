"""Export to the Hugging Face layout, right or refused."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import keras_hub

from keras_ebft.export.layouts import layout_of
from keras_ebft.networks import adapters, check_supported
from keras_ebft.networks import export_tokenizer as write_tokenizer

logger = logging.getLogger("keras_ebft")


def export_to_hugging_face(
    causal_lm: keras_hub.models.CausalLM, path: str | os.PathLike[str]
) -> None:
    """Writes a causal language model as a Hugging Face checkpoint.

    The folder holds `config.json`, `model.safetensors` and, where KerasHub can
    write it, the tokenizer; elsewhere a warning is logged, and the files of the
    checkpoint that training began with serve. Adapters are merged into the
    exported weights; the model itself keeps them apart.

    Exported and compared after loading back, with KerasHub and with `transformers`:
    Gemma, Gemma 2, Gemma 3 (text), GPT-2, Llama, Llama 3, Mistral, Qwen 2/2.5 and
    Qwen 3. KerasHub normalises the queries and keys of Qwen 3 with an epsilon of its
    own, 1e-5, which the layout cannot say: logits may differ by 1e-3 elsewhere.

    Args:
        causal_lm: `keras_hub.models.CausalLM`.
        path: folder, made if it does not exist.

    Raises:
        TypeError: if `causal_lm` is not a `CausalLM`.
        ValueError: if its family cannot be exported rightly, or it is quantized.

    Example:
    ```python
    keras_ebft.export_to_hugging_face(causal_lm, "tuned")
    keras_hub.models.CausalLM.from_preset("tuned")
    ```
    """
    check_supported(causal_lm)
    backbone = causal_lm.backbone
    _check_not_quantized(backbone)
    layout, path = layout_of(backbone), Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with adapters.merged(backbone):
        if layout.write is None:
            _export_backbone(causal_lm, path)
        else:
            _write(path, *layout.write(backbone))
    if causal_lm.preprocessor is not None:
        _export_tokenizer(causal_lm.preprocessor.tokenizer, path)


def _export_backbone(causal_lm: keras_hub.models.CausalLM, path: Path) -> None:
    without_tokenizer = type(causal_lm)(backbone=causal_lm.backbone, preprocessor=None)
    without_tokenizer.export_to_transformers(str(path))


def _write(path: Path, config: dict[str, Any], weights: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _export_tokenizer(tokenizer: keras_hub.tokenizers.Tokenizer, path: Path) -> None:
    if hasattr(tokenizer, "write_hugging_face"):
        tokenizer.write_hugging_face(path)
    elif not write_tokenizer(tokenizer, path):
        logger.warning(
            "The tokenizer was not exported: KerasHub %s has no Hugging Face layout "
            "for a %s. Training leaves tokenizers alone: copy the files of the "
            "checkpoint you began with.",
            keras_hub.__version__,
            type(tokenizer).__name__,
        )


def _check_not_quantized(backbone: keras_hub.models.Backbone) -> None:
    quantized = [
        layer.path
        for layer in adapters.layers_of(backbone)
        if getattr(layer, "quantization_mode", None) is not None
    ]
    if quantized:
        raise ValueError(
            "Expected a model that is not quantized. Received: a "
            f"{type(backbone).__name__} with {len(quantized)} quantized layers, "
            f"such as {quantized[0]}. Load the unquantized preset, load the trained "
            "adapters with backbone.load_lora_weights() and export that."
        )
