"""Tables with named columns, known by what they offer.

None of the packages that they come from is imported: who holds one has it.
"""

from typing import Any


def columns_of(x: Any) -> list[str] | None:
    """The names of a table's columns, `None` of what is no table.

    Raises:
        ValueError: for a dict of tables.
    """
    if isinstance(x, dict):
        if x and all(columns_of(part) is not None for part in x.values()):
            raise ValueError(
                "Expected one split of a data set. Received: a "
                f"{type(x).__name__} of {', '.join(map(repr, x))}. Pass one of them, "
                f"for example x[{next(iter(x))!r}]."
            )
        return None
    # Of pyarrow and Hugging Face; of pandas and polars.
    names = getattr(x, "column_names", None)
    if names is None and (hasattr(x, "to_dicts") or hasattr(x, "iterrows")):
        names = x.columns
    if names is None and hasattr(x, "resolve_features"):
        names = x.resolve_features().column_names
    return None if names is None else [str(name) for name in names]


def as_records(x: Any) -> Any:
    """A table as records, dicts from columns to values; anything else as it is."""
    if hasattr(x, "iterrows"):
        return x.to_dict("records")
    for to_records in ("to_dicts", "to_pylist"):
        if columns_of(x) is not None and hasattr(x, to_records):
            return getattr(x, to_records)()
    # A data set may hand out arrays or tables; its own form is dicts.
    return x.with_format(None) if hasattr(x, "with_format") else x
