"""Columns of text and of labels, as the tasks that have them want them: nothing missing, labels as indices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimize.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa


def texts(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """The column as strings, with nothing missing and nothing blank."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SourceError(f"column {name!r} holds {column.type}, not text", hint="choose the column with the text")
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
    refuse_rows("no text", name, blank.to_pylist())
    return column.cast(pa.string())


def labels(
    table: pa.Table, column: str, given: Sequence[str] | Mapping[str | int, str] | None
) -> tuple[list[str], list[int]]:
    """(names in order of their index, each row's index). `given` is what the recipe says in `data.labels`.

    Raises `SourceError` for a missing label, one that `given` does not have, or a single one.
    """
    values = [_value(value) for value in _decoded(table, column)]
    refuse_rows("no label", column, (value is None for value in values))
    names, index = _named(values, given, column)
    return names, [index[str(value)] for value in values]


def words(column: pa.ChunkedArray, name: str) -> list[list[str]]:
    """Rows of words: a list of texts as it is, a single text split at white space. None may be empty."""
    rows = [value.split() if isinstance(value, str) else value for value in column.to_pylist()]
    refuse_rows("no words", name, (not row for row in rows))
    if not all(isinstance(row, list) and all(isinstance(word, str) for word in row) for row in rows):
        raise SourceError(f"column {name!r} holds {column.type}, not words", hint="choose the column with the words")
    return rows


def label_lists(
    table: pa.Table, column: str, given: Sequence[str] | Mapping[str | int, str] | None
) -> tuple[list[str], list[list[int]]]:
    """`labels` for rows that have several: a list of names or whole numbers, or names in one text."""
    decoded = [row.split() if isinstance(row, str) else row for row in _decoded(table, column)]
    if not all(row is None or isinstance(row, list) for row in decoded):
        raise SourceError(f"column {column!r} holds one label a row, not one a word")
    rows = [[_value(value) for value in row or ()] for row in decoded]
    refuse_rows("no label", column, (not row or None in row for row in rows))
    names, index = _named([value for row in rows for value in row], given, column)
    return names, [[index[str(value)] for value in row] for row in rows]


def refuse_rows(what: str, column: str, bad: Iterable[bool], hint: str = "fill these cells or remove the rows") -> None:
    """Raise `SourceError` where a row is bad."""
    rows = [i for i, is_bad in enumerate(bad, start=1) if is_bad]
    if rows:
        shown = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        raise SourceError(
            f"{what} in column {column!r} of row{'s' if len(rows) > 1 else ''} {shown} (the first row is 1)",
            hint=hint,
        )


def _decoded(table: pa.Table, column: str) -> list[Any]:
    """The labels' values, with a class label of `datasets` by its name."""
    values: list[Any] = table[column].to_pylist()
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    feature = json.loads(metadata)["info"]["features"].get(column, {}) if metadata else {}
    if isinstance(feature, list):  # several a row, as older versions write it
        feature = {"feature": feature[0]}
    feature = feature.get("feature", feature)
    if feature.get("_type") != "ClassLabel" or not feature.get("names"):
        return values

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(one) for one in value]
        # -1 is what `datasets` writes for a missing label.
        return feature["names"][value] if value is not None and value >= 0 else None

    return [name(value) for value in values]


def _value(value: Any) -> str | int | None:
    """A label as a name or a number; None where it is missing."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value if value.strip() else None
    if value is None or isinstance(value, int):
        return value
    raise SourceError(f"label {value!r} is neither a name nor a whole number", hint="choose the column with the label")


def _named(
    values: Sequence[str | int | None], given: Sequence[str] | Mapping[str | int, str] | None, column: str
) -> tuple[list[str], dict[str, int]]:
    """(names in order of their index, value in the data as text -> index)."""
    found = sorted({value for value in values if value is not None}, key=lambda value: (isinstance(value, str), value))
    if given is None:
        names = [str(value) for value in found]
        index = {name: i for i, name in enumerate(names)}
    elif isinstance(given, Mapping):
        names = list(dict.fromkeys(given.values()))
        index = {str(value): names.index(name) for value, name in given.items()}
    else:
        names = list(given)
        numbered = all(isinstance(value, int) for value in found)
        index = {str(i) if numbered else name: i for i, name in enumerate(names)}
    if len(set(names)) != len(names):
        raise SourceError("`data.labels` names a label twice", hint="to join labels, map both values to one name")
    if unknown := [str(value) for value in found if str(value) not in index]:
        raise SourceError(
            f"column {column!r} holds labels that `data.labels` does not have: {listed(unknown)}",
            hint="add them to `data.labels`, or leave their rows out with `data.filter`",
        )
    if len(names) < 2:
        raise SourceError(f"column {column!r} holds one label only: {listed(names)}", hint="choose another column")
    return names, index


def listed(names: Iterable[str]) -> str:
    """The first ten, quoted, and how many more."""
    names = list(names)
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
