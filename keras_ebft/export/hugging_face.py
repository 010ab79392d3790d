"""Export to the Hugging Face layout, right or refused."""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras_hub

from keras_ebft.backend.replicas import own_path
from keras_ebft.backend.updates import check_finite
from keras_ebft.export.generation import write_generation, writer_of
from keras_ebft.export.layouts import layout_of
from keras_ebft.networks import adapters, check_supported, family_of
from keras_ebft.networks import export_tokenizer as write_tokenizer

logger = logging.getLogger("keras_ebft")


def export_to_hugging_face(
    causal_lm: keras_hub.models.CausalLM, path: str | os.PathLike[str]
) -> None:
    """Writes a causal language model as a Hugging Face checkpoint.

    The folder holds `config.json`, `model.safetensors`, and of a model with a
    preprocessor `generation_config.json` and the tokenizer: `transformers` begins
    and ends a text with the tokens it begins and ends with here. A tokenizer that
    has no such layout is logged, and the files of the checkpoint that training
    began with serve. Adapters are merged into the
    exported weights; the model itself keeps them apart. The files are moved to the
    folder when all are written, and where one cannot be moved the folder stays as it
    was; other files in it stay. Of several processes the first writes. Needs
    `pip install "keras_ebft[export]"`.

    Exported and compared after loading back, with KerasHub and with `transformers`:
    Gemma, Gemma 2, Gemma 3 (text), GPT-2, Llama, Llama 3, Mistral, Qwen 2/2.5 and
    Qwen 3. KerasHub normalises the queries and keys of Qwen 3 with an epsilon of its
    own, 1e-5, which the layout cannot say: logits may differ by 1e-3 elsewhere.

    Args:
        causal_lm: `keras_hub.models.CausalLM`.
        path: folder, made if it does not exist.

    Raises:
        FloatingPointError: if a weight is not finite.
        ImportError: if the package `safetensors` is missing.
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
    _check_packages()
    with own_path(path) as own:
        if own is not None:
            _export(causal_lm, layout, Path(own))


def _export(causal_lm: Any, layout: Any, path: Path) -> None:
    backbone = causal_lm.backbone
    check_finite(backbone.variables, path)
    with _written_whole(path) as folder:
        with adapters.merged(backbone):
            if layout.write is None:
                _export_backbone(causal_lm, folder)
            else:
                _write(folder, *layout.write(backbone))
        if causal_lm.preprocessor is not None:
            _export_tokenizer(causal_lm.preprocessor.tokenizer, backbone, folder)
            write_generation(causal_lm, folder)


def _check_packages() -> None:
    # KerasHub's own export needs it, too, and says so when half is written.
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError(
            "Expected the package safetensors, which writes the weights. Received: "
            'none is installed. Install it with: pip install "keras_ebft[export]"'
        )


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Context with a folder to write to, whose files are in `path` at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{uuid.uuid4().hex[:12]}-{path.name}")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            with tempfile.TemporaryDirectory(dir=partial) as replaced:
                names = [file.name for file in partial.iterdir()]
                names.remove(os.path.basename(replaced))
                _replace_files(partial, path, names, Path(replaced))
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_files(source: Path, path: Path, names: list[str], replaced: Path) -> None:
    """Moves files to a folder: all of them, or none and the folder is as it was.

    Args:
        source: folder that the files are in.
        path: folder that they go to.
        names: their names.
        replaced: folder for those that they replace.
    """
    with contextlib.ExitStack() as undo:
        for name in names:
            if os.path.lexists(path / name):
                os.replace(path / name, replaced / name)
                undo.callback(os.replace, replaced / name, path / name)
            os.replace(source / name, path / name)
            undo.callback(os.replace, path / name, source / name)
        undo.pop_all()


def _export_backbone(causal_lm: keras_hub.models.CausalLM, path: Path) -> None:
    without_tokenizer = type(causal_lm)(backbone=causal_lm.backbone, preprocessor=None)
    without_tokenizer.export_to_transformers(str(path))


def _write(path: Path, config: dict[str, Any], weights: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _export_tokenizer(
    tokenizer: keras_hub.tokenizers.Tokenizer,
    backbone: keras_hub.models.Backbone,
    path: Path,
) -> None:
    own = writer_of(tokenizer, family_of(backbone).layout)
    if hasattr(tokenizer, "write_hugging_face"):
        tokenizer.write_hugging_face(path)
    elif own is not None:
        own(tokenizer, path)
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
