"""Rows that are images: a tree of folders, one a class, or a table with a column of images or of paths to them.

Paths lead to files of the source's own folder and nowhere else. What is read becomes part of the prepared rows, so that
their digest says which pixels a model was scored on.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import SourceError
from optimize.source import Origin
from optimize.source.hub import Hub

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE, LABEL = "image", "label"
"""The columns of a tree."""


def read_tree(origin: Origin, names: Sequence[str], scratch: Path) -> pa.Table:
    """The images of folders that are named after their class: `cat/1.jpg`. Deeper folders belong to the first.

    Raises `SourceError` for an image in no folder.
    """
    import pyarrow as pa

    if loose := [name for name in names if "/" not in name]:
        raise SourceError(
            f"{loose[0]} of {origin} lies in no folder that would say its class",
            hint="put every image in a folder named after its label, or add a table (rows.csv) of paths and labels",
        )
    origin.copy(("*",), scratch)
    images = [{"bytes": (scratch / name).read_bytes(), "path": name} for name in names]
    return pa.table({IMAGE: pa.array(images, _image()), LABEL: [name.partition("/")[0] for name in names]})


def embedded(table: pa.Table, column: str, origin: Origin, scratch: Path, numbers: Sequence[int]) -> pa.Table:
    """The table with its images as `datasets` keeps them, {"bytes", "path"}: paths are replaced by what they lead to.

    `numbers` are the rows' numbers in their file, for messages. A table without the column is left as it is. Raises
    `SourceError` for a path that leads to no file of the source's folder, and for a cell without an image.
    """
    import pyarrow as pa

    if column not in table.column_names:
        return table
    cells = [_cell(value) for value in table[column].to_pylist()]
    if any(content is None and path for content, path in cells):
        if isinstance(origin, Hub):
            raise SourceError(f"column {column!r} of {origin} holds paths, and a hub data set is read without files")
        found = {*origin.names()}
        folder = scratch / "images"
        origin.copy(("*",), folder)
        cells = [
            (_content(path, column, number, origin, found, folder) if content is None and path else content, path)
            for number, (content, path) in zip(numbers, cells, strict=True)
        ]
    for number, (content, _) in zip(numbers, cells, strict=True):
        if not content:
            raise SourceError(
                f"no image in column {column!r} of row {number} of {origin}", hint="fill the cell or remove the row"
            )
    images = pa.array([{"bytes": content, "path": path} for content, path in cells], _image())
    return table.set_column(table.column_names.index(column), column, images)


def _image() -> pa.DataType:
    import pyarrow as pa

    return pa.struct({"bytes": pa.large_binary(), "path": pa.string()})


def _cell(value: Any) -> tuple[bytes | None, str | None]:
    """(the image file's bytes, its path), as far as they are known."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value, None
    if value is None or isinstance(value, str):
        return None, value
    raise SourceError(
        f"a {type(value).__name__} is no image", hint="choose the column with the paths or bytes, or say data.pixels"
    )


def _content(path: str, column: str, number: int, origin: Origin, found: set[str], folder: Path) -> bytes:
    name = posixpath.normpath(path)
    if name in found:
        return (folder / name).read_bytes()
    single = len(found) == 1
    raise SourceError(
        f"row {number} of {origin} names the image {path!r}, which is not among its files",
        hint="set data.source to the folder that holds the table and the images"
        if single
        else f"paths in {column!r} start from that folder and stay in it",
    )
