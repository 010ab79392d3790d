"""Records with named columns as documents."""

import string
from _string import formatter_field_name_split
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from keras_ebft.configurable import Shown
from keras_ebft.data.columns import as_records
from keras_ebft.data.documents import is_missing


def from_records(
    records: Iterable[Any],
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
) -> "RecordDocuments":
    """Texts or pairs made from the columns of records.

    Args:
        records: sequence or iterable of dicts, such as a `datasets.Dataset`, a
            DataFrame of pandas or polars, or a `tfds` data source. Bytes are read
            as UTF-8. A record whose wanted column is `None`, NaN or pandas' `NA`, or
            lies within one that is, becomes an empty document, which `pack` counts.
        text: template of a text, such as `"{text}"`. Column names stand in
            braces, as for `str.format`; `"{translation[en]}"` looks into a column.
        prompt: template of a prompt; together with `answer`, in place of `text`.
        answer: template of an answer.

    Returns:
        `RecordDocuments`, which `keras_ebft.data.pack` takes; indexable where the
        records are.

    Raises:
        TypeError: for a template that is no string.
        ValueError: unless it is either `text` or `prompt` and `answer`, or for braces
            that do not match. While reading: for a record that lacks a column or is
            no dict, or bytes that are not UTF-8.

    Example:
    >>> records = [{"question": "1 + 1 =", "result": 2}]
    >>> list(from_records(records, prompt="{question} ", answer="{result}"))
    [('1 + 1 = ', '2')]
    """
    pair = (prompt is not None) + (answer is not None)
    if (text is not None) == bool(pair) or pair == 1:
        raise ValueError(
            "Expected either a template `text`, or both `prompt` and `answer`. "
            f"Received: text={text!r}, prompt={prompt!r}, answer={answer!r}. "
            'Pass for example text="{text}".'
        )
    templates = (text,) if pair == 0 else (prompt, answer)
    for template in templates:
        _check_template(template)
    records = as_records(records)
    if hasattr(records, "__getitem__") and hasattr(records, "__len__"):
        return RecordSequence(records, templates)
    return RecordDocuments(records, templates)


class RecordDocuments(Shown):
    """Documents made from records, one from each. Made by `from_records`.

    Attributes:
        records: the records.
    """

    def __init__(self, records: Any, templates: Sequence[Any]) -> None:
        self.records = records
        self._templates = templates

    def __iter__(self) -> Iterator[str | tuple[str, ...]]:
        return (self._document(record) for record in self.records)

    def _document(self, record: Any) -> str | tuple[str, ...]:
        filled = [_fill(template, record) for template in self._templates]
        nothing = None in filled
        parts = tuple("" if nothing else str(part) for part in filled)
        return parts if len(parts) > 1 else parts[0]


class RecordSequence(RecordDocuments):
    """Documents made from records that can be indexed. Made by `from_records`."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | slice) -> Any:
        """Document `index`, or a list of those of a slice."""
        if isinstance(index, slice):
            # One by one: a slice of records may be a dict of columns.
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._document(self.records[index])


class _NothingThereError(Exception):
    """A column holds nothing."""


class _Template(string.Formatter):
    """Templates as for `str.format`, without writing "None" into a document."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, int | str]:
        """The value of one column, before it is converted to text."""
        first, path = formatter_field_name_split(field_name)
        value = self.get_value(first, args, kwargs)
        for is_attribute, name in path:
            if is_missing(value):
                raise _NothingThereError
            value = getattr(value, name) if is_attribute else value[name]
        if is_missing(value):
            raise _NothingThereError
        return value, first


def _check_template(template: Any) -> None:
    if not isinstance(template, str):
        raise TypeError(
            "Expected a template to be a string. Received: "
            f"{template!r} (of type {type(template).__name__}). Pass for example "
            '"{text}".'
        )
    try:
        list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            "Expected a template with column names in braces. Received: "
            f"{template!r}; {error}. Write braces that are text twice: {{{{ and }}}}."
        ) from error


def _fill(template: str, record: Any) -> str | None:
    """The filled template, `None` if a column it names holds nothing."""
    if not isinstance(record, Mapping):
        raise ValueError(
            "Expected records to be dicts with named columns. Received: a "
            f"{type(record).__name__}. Pass texts and pairs as they are."
        )
    record = _decoded(record)
    try:
        return _Template().vformat(template, (), record)
    except _NothingThereError:
        return None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        raise ValueError(
            f"Expected records with {', '.join(wanted)}. Received: columns "
            f"{sorted(map(str, record))}; {_reason(error)}. Change the template "
            f"{template!r}."
        ) from error


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decoded(part) for name, part in value.items()}
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected text in UTF-8. Received: a record with {value[:40]!r}, {error}. "
            "Convert it, or leave the record out."
        ) from error
