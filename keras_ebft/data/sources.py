"""Data sets by name: this library's own, the paper's, any of tfds or Hugging Face."""

import dataclasses
from typing import Any

from keras_ebft.data.records import RecordDocuments, from_records
from keras_ebft.validation import check_choice

LIBRARIES = ("tfds", "huggingface")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Where a data set is and what its documents are made of.

    Attributes:
        library: `"tfds"` or `"huggingface"`.
        path: str, the data set's name there.
        config: str or `None`, the default configuration.
        text: template, see `from_records`. In templates `<config>` stands for the
            configuration; where that is a pair of languages such as `"de-en"`,
            `<source>` and `<target>` stand for its halves.
        prompt: template.
        answer: template.
    """

    library: str
    path: str
    config: str | None = None
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None


PRESETS = {
    "python_source": Preset("tfds", "python_source", text="{text}"),
    "python_docstrings": Preset(
        "tfds", "python_docstrings", prompt="{prompt}", answer="{body}"
    ),
    "message_catalogues": Preset(
        "tfds",
        "message_catalogues",
        config="en-de",
        prompt="{source}\n",
        answer="{target}",
    ),
    # The paper's sets. Splits and configurations are their publishers'.
    "opencodeinstruct": Preset(
        "huggingface", "nvidia/OpenCodeInstruct", prompt="{input}\n", answer="{output}"
    ),
    "swallowcode": Preset(
        "huggingface",
        "tokyotech-llm/swallow-code",
        config="swallow-code",
        text="{text}",
    ),
    "alma": Preset(
        "huggingface",
        "haoranxu/ALMA-Human-Parallel",
        config="de-en",
        prompt="{translation[<source>]}\n",
        answer="{translation[<target>]}",
    ),
    "wmt22": Preset(
        "huggingface",
        "haoranxu/WMT22-Test",
        config="de-en",
        prompt="{<config>[<source>]}\n",
        answer="{<config>[<target>]}",
    ),
}


def load(
    name: str,
    split: str,
    *,
    config: str | None = None,
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    data_dir: str | None = None,
    streaming: bool = False,
) -> RecordDocuments:
    """Loads the documents of a data set.

    Args:
        name: a preset (`sorted(keras_ebft.data.PRESETS)`), or `"tfds:<name>"`, or
            `"huggingface:<path>"`, where the path may be a local folder.
        split: str such as `"train"`, or a slice of one as the library writes it,
            `"train[:10%]"`.
        config: str, configuration of the data set; by default the preset's.
        text: template of a text, see `from_records`; by default the preset's.
        prompt: template of a prompt, with `answer` in place of `text`.
        answer: template of an answer.
        data_dir: folder of prepared data, by default the library's own.
        streaming: bool, read records over the network as they are needed
            (Hugging Face only).

    Returns:
        `RecordDocuments`, which `keras_ebft.data.pack` takes.

    Raises:
        ImportError: if the library is not installed.
        ValueError: for an unknown name, a split that is empty, or templates that
            are missing or do not fit the columns of the first record.

    Example:
    ```python
    texts = keras_ebft.data.load("python_source", split="train")
    pairs = keras_ebft.data.load("opencodeinstruct", split="train[:1%]")
    ```
    """
    library, _, path = name.partition(":")
    if path:
        preset = Preset(check_choice("name", library, LIBRARIES), path)
    else:
        preset = PRESETS[check_choice("name", name, sorted(PRESETS))]
    config = config or preset.config
    if text is None and prompt is None and answer is None:
        text, prompt, answer = (
            _languages(template, config)
            for template in (preset.text, preset.prompt, preset.answer)
        )
    if preset.library == "tfds":
        if streaming:
            raise ValueError(
                "Expected streaming=False with a tfds data set, which is prepared on "
                "disk. Received: streaming=True. Leave it out."
            )
        records = _load_tfds(preset.path, config, split, data_dir)
    else:
        records = _load_huggingface(preset.path, config, split, data_dir, streaming)
    documents = from_records(records, text, prompt, answer)
    _check_first(documents, name, split)
    return documents


def _languages(template: str | None, config: str | None) -> str | None:
    if template is None or "<" not in template:
        return template
    source, _, target = (config or "").partition("-")
    for placeholder, value in (
        ("<config>", config or ""),
        ("<source>", source),
        ("<target>", target),
    ):
        template = template.replace(placeholder, value)
    return template


def _load_tfds(path: str, config: str | None, split: str, data_dir: str | None) -> Any:
    tfds = _import("tensorflow_datasets", "tensorflow-datasets", "data")
    from keras_ebft.data import builders

    own = builders.builder_class(path)
    if own is None:
        builder = tfds.builder(
            path, config=config, data_dir=data_dir, file_format="array_record"
        )
    else:
        if path == "message_catalogues" and config not in own.builder_configs:
            # Any pair of languages will do, not only those listed.
            config = builders.language_pair(config)
        builder = own(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    if not builder.info.splits[split].num_examples:
        raise _empty(path, split)
    return builder.as_data_source(split)


def _load_huggingface(
    path: str, config: str | None, split: str, data_dir: str | None, streaming: bool
) -> Any:
    datasets = _import("datasets", "datasets", "huggingface")
    return datasets.load_dataset(
        path, config, split=split, cache_dir=data_dir, streaming=streaming
    )


def _import(module: str, package: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Expected the package {package!r} for this data set. Received: {error}. "
            f'Install it: pip install "keras_ebft[{extra}]".'
        ) from error


def _check_first(documents: RecordDocuments, name: str, split: str) -> None:
    for _ in documents:
        return
    raise _empty(name, split)


def _empty(name: str, split: str) -> ValueError:
    return ValueError(
        f"Expected records in split {split!r} of {name!r}. Received: none. Check the "
        "split's name and slice."
    )
