"""The documents that a run's settings name."""

from pathlib import Path
from typing import Any

from keras_ebft import data
from keras_ebft.cli.settings import DataSection, SourceSection

OF_FILES = ("pattern",)
OF_DATA_SETS = ("split", "config", "data_dir")


def read_source(source: SourceSection, section: str) -> list[Any]:
    """All documents of a source, as a list.

    Args:
        source: what the settings say.
        section: str, where they say it, for errors.

    Raises:
        FileNotFoundError, ImportError, ValueError: for what cannot be read.
    """
    given = source.given()
    if (source.path is None) == (source.name is None):
        raise ValueError(
            f"Expected either `path` or `name` in `{section}`. Received: "
            f"{given}. Name a file or folder, or a data set."
        )
    others = OF_FILES if source.path is None else OF_DATA_SETS
    unused = [name for name in others if name in given]
    if unused:
        kind = "data set" if source.path is None else "file or folder"
        raise ValueError(
            f"Expected no {', '.join(unused)} in `{section}` with a {kind}. Received: "
            f"{given}. Leave them out."
        )
    options = source.given("path", "name")
    if source.path is not None:
        return list(data.from_path(Path(source.path), **options))
    return list(data.load(source.name, **{"split": "train", **options}))


def read_documents(section: DataSection) -> tuple[list[Any], list[Any] | None]:
    """`(training, validation)` documents; `None` where nothing is held out.

    Raises:
        ValueError: for a share that leaves nothing on one side, and as `read_source`.
    """
    train = read_source(section.train, "data.train")
    if section.validation is not None:
        if section.validation_split:
            raise ValueError(
                "Expected either `data.validation` or `data.validation_split`. "
                "Received: both. Leave one of them out."
            )
        return train, read_source(section.validation, "data.validation")
    share = section.validation_split
    if not share:
        return train, None
    kept = int(len(train) * (1.0 - share))
    if not 0 < kept < len(train):
        raise ValueError(
            "Expected `data.validation_split` to leave documents on both sides. "
            f"Received: {share} of {len(train)} documents."
        )
    return train[:kept], train[kept:]


def as_rows(documents: list[Any], pack: dict[str, Any] | None, causal_lm: Any) -> Any:
    """Documents as `fit` gets them: packed if the settings say so.

    Args:
        documents: list of texts or pairs.
        pack: arguments of `keras_ebft.data.pack`, or `None`.
        causal_lm: `keras_hub.models.CausalLM` with a preprocessor.
    """
    if pack is None:
        return documents
    return data.pack(documents, causal_lm.preprocessor.tokenizer, **pack).load().arrays
