"""Tables, files and folders as documents."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_ebft.data.columns import as_records, columns_of
from keras_ebft.data.records import RecordDocuments, from_records
from keras_ebft.data.text_files import TextFiles

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Columns that need no template.
TEXT, PAIR = "text", ("prompt", "answer")


def from_path(
    path: str | os.PathLike[str],
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    pattern: str | None = None,
) -> RecordDocuments | TextFiles | list[str]:
    r"""The documents of a file or a folder.

    Args:
        path: a file of records (`.jsonl`; `.json`, a list of them; `.csv`, `.tsv`
            with a first line of names; `.parquet`), a text (`.txt`, one document),
            or a folder of texts.
        text: template of a text, see `from_records`. Without templates records
            have a column `text`, or `prompt` and `answer`.
        prompt: template of a prompt, with `answer` in place of `text`.
        answer: template of an answer.
        pattern: str, which files of a folder, by default `"*.txt"`.

    Returns:
        documents, which `fit` and `keras_ebft.data.pack` take.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ImportError: for Parquet, if `pyarrow` is not installed.
        ValueError: for files of another kind, damaged ones, columns that are
            missing, or templates and patterns where there is no use for them.

    Example:
    ```python
    pairs = keras_ebft.data.from_path(
        "questions.jsonl", prompt="{question}\n", answer="{answer}"
    )
    model.fit(pairs, batch_size=16)
    ```
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected an existing file or folder. Received: {str(path)!r}. Check the "
            "path."
        )
    templates = {"text": text, "prompt": prompt, "answer": answer}
    given = {name: value for name, value in templates.items() if value is not None}
    is_text = path.is_dir() or path.suffix == ".txt"
    if is_text and given:
        raise ValueError(
            "Expected no templates for texts, which have no columns. Received: "
            f"{', '.join(given)} with {str(path)!r}. Leave them out."
        )
    if pattern is not None and not path.is_dir():
        raise ValueError(
            f"Expected a folder with `pattern`. Received: {str(path)!r}, a file. "
            "Leave the pattern out."
        )
    if path.is_dir():
        return TextFiles(path, pattern or "*.txt")
    if path.suffix == ".txt":
        return [_read_text(path)]
    records = _read_records(path)
    if given:
        return from_records(records, **given)
    columns = list(records[0]) if records else []
    return from_records(records, **_default_templates(columns, f"'{path}'"))


def as_documents(x: Any) -> Any:
    """Tables, columns, files and folders as documents; anything else as it is.

    Args:
        x: DataFrame of pandas or polars, table of pyarrow, `datasets.Dataset` or
            `IterableDataset` with a column `text`, or `prompt` and `answer`; a
            column of a DataFrame; a `pathlib.Path`.

    Returns:
        documents that `pack` takes.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `from_path`.
    """
    if isinstance(x, os.PathLike):
        return from_path(x)
    columns = columns_of(x)
    if columns is not None:
        name = type(x).__name__
        return from_records(as_records(x), **_default_templates(columns, f"a {name}"))
    if hasattr(x, "to_list") and hasattr(x, "dtype"):
        # A column, whose rows may have labels in place of numbers.
        return x.to_list()
    return x


def is_table(x: Any) -> bool:
    """Whether `as_documents` makes documents in memory of `x`."""
    return isinstance(x, (os.PathLike, TextFiles)) or (
        columns_of(x) is not None and hasattr(x, "__len__")
    )


def _default_templates(columns: list[str], received: str) -> dict[str, str]:
    has_text, has_pair = TEXT in columns, set(PAIR) <= set(columns)
    if has_text != has_pair:
        return {name: f"{{{name}}}" for name in ((TEXT,) if has_text else PAIR)}
    example = columns[0] if columns else "column"
    raise ValueError(
        "Expected a column 'text', or columns 'prompt' and 'answer', and not all of "
        f"them. Received: {received} with {columns}. Say what documents are made "
        f'of: text="{{{example}}}", or prompt= and answer=, of '
        "keras_ebft.data.from_records(table, ...) or keras_ebft.data.from_path(path, "
        "...)."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected a file in UTF-8. Received: '{path}', {error}. Convert it."
        ) from error


def _read_records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"Expected a folder, or a file that ends in {', '.join(SUFFIXES)}. "
            f"Received: {str(path)!r}. Convert it, or read it yourself and pass a "
            "list of texts."
        )
    content = _read_text(path)
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(content, path)
    records = list(_json_records(content, path))
    if not all(isinstance(record, dict) for record in records):
        wrong = next(r for r in records if not isinstance(r, dict))
        raise ValueError(
            f"Expected records, objects with named columns, in '{path}'. Received: "
            f'{json.dumps(wrong)[:60]}. Write objects such as {{"text": ...}}.'
        )
    return records


def _json_records(content: str, path: Path) -> Iterator[Any]:
    whole = path.suffix == ".json"
    # Not `splitlines`, which also ends lines within strings.
    for number, line in enumerate([content] if whole else content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            place = error.lineno if whole else number
            raise ValueError(
                f"Expected JSON in '{path}'. Received: line {place}, "
                f"{line.strip()[:60]!r}; {error}. Mend the file."
            ) from error
        if whole:
            yield from found if isinstance(found, list) else [found]
        else:
            yield found


def _read_csv(content: str, path: Path) -> list[dict[str, Any]]:
    # Texts are longer than the fields that the module expects.
    limit = csv.field_size_limit(sys.maxsize)
    # Not `splitlines`, which also ends lines within a text, at form feeds.
    lines = io.StringIO(content, newline="")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        records = list(_whole_records(reader))
    except csv.Error as error:
        raise _damaged(path, reader.reader.line_num, error) from error
    finally:
        csv.field_size_limit(limit)
    return records


def _whole_records(reader: "csv.DictReader[str]") -> Iterator[dict[str, Any]]:
    names = list(reader.fieldnames or ())
    if len(set(names)) < len(names):
        raise csv.Error(f"two columns of one name among {names}")
    for record in reader:
        # What is left where a text holds a delimiter and has no quotes.
        if None in record:
            more = len(record[None])
            raise csv.Error(f"{len(names) + more} fields for the columns {names}")
        yield record


def _damaged(path: Path, line: int, reason: Exception) -> ValueError:
    return ValueError(
        f"Expected '{path}' to hold a line of names, and as many fields in every line "
        "after it, those with delimiters, quotes or line ends in quotes. Received: "
        f"line {line}, {reason}. Mend the file."
    )


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(
            f"Expected the package pyarrow, to read '{path}'. Install it: "
            'pip install "keras_ebft[huggingface]".'
        ) from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(
            f"Expected a file in Parquet. Received: '{path}', {error}"
        ) from error
