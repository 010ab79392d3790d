"""`use_compilation_cache`: the second start of a run compiles nothing."""

import os
from pathlib import Path

from keras_ebft.backend.compilation_cache import keep_compiled_programs
from keras_ebft.models.cache import cache_folder


def use_compilation_cache(folder: str | os.PathLike | None = None) -> Path | None:
    """Keeps what JAX compiles in a folder, where the next process finds it.

    The first step of a run that was started before is traced, but not compiled again:
    with SmolLM2 it begins in a third of the time (docs/benchmarks.md). Programs are
    found by all they depend on, so that nothing is ever run that was compiled for
    another model, shape, version or machine; old ones are not deleted. To be called
    before anything is compiled that is to be kept.

    Args:
        folder: `pathlib.Path` or str, made where it does not exist. By default
            `compiled` in the user's cache folder of this library (`XDG_CACHE_HOME`,
            or `~/.cache`).

    Returns:
        `pathlib.Path` of the folder; `None` on TensorFlow and PyTorch, which have
        nothing that can be kept, so that a script may call it on every backend.

    Raises:
        OSError: if the folder cannot be made or written to.
        TypeError: if `folder` is no path.

    Example:
    ```python
    keras_ebft.use_compilation_cache()
    model.fit(documents, batch_size=16)
    ```
    """
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise TypeError(
            "Expected `folder` to be a path or None. Received: "
            f"{type(folder).__name__}. Pass a pathlib.Path, or leave it out."
        )
    path = cache_folder() / "compiled" if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(
            f"Expected a folder that can be written to. Received: '{path}'. Pass "
            "another."
        )
    return path if keep_compiled_programs(str(path)) else None
