"""Files of rows into one table, through `datasets`, and the recipe's row filter."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.data.images import read_tree
from optimize.errors import SourceError
from optimize.source import DATA_SUFFIXES, IMAGES, Local, Origin, data_format
from optimize.source.hub import Hub
from optimize.source.wheel import Wheel

if TYPE_CHECKING:
    import pyarrow as pa

READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # An empty cell is missing; the words NA, None and null are text.
    "csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    "tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t"}),
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
    "arrow": ("arrow", {}),
    "text": ("text", {"sample_by": "document"}),
    "conll": ("text", {"sample_by": "document"}),
}
"""Format -> the reader in `datasets`, and its options."""


def read(
    origin: Origin,
    scratch: Path,
    *,
    format: str | None,
    subset: str | None,
    split: str | None,
    header: bool = True,
    columns: Sequence[str] | None = None,
    quotes: bool = True,
    images: bool = False,
) -> pa.Table:
    """All rows that are there, in memory. `scratch` is an empty folder, `split` one that a hub data set has. With
    `images` they may be images in folders.

    Of a text file every line is a row, without its line end; what follows the last one is a row as well, often empty.
    So `"\\n".join` gives back the text as it was, though with every line end as "\\n".

    Raises `SourceError` for a format that nothing tells, and for a file that can't be read as what it claims to be.
    """
    if isinstance(origin, Hub):
        if Path(origin.repo).is_dir():
            raise SourceError(
                f"{origin.repo} lies in the present folder, too, and `datasets` would read that instead of the hub's",
                hint="run from another folder, or write ./ before the path to mean the local one",
            )
        cache = scratch / "cache"
        return _load(
            origin, "hub data set", split, path=origin.repo, name=subset, revision=origin.commit, cache_dir=cache
        )
    names, chosen = files_of(origin, format, images=images)
    if chosen == IMAGES:
        return read_tree(origin, names, scratch)
    origin.copy([glob.escape(name) for name in names], scratch)
    reader, options = READERS[chosen]
    if reader == "csv":
        named = {"names": list(columns)} if columns else {"header": "infer" if header else None}
        options = {**options, **named, "quoting": csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE}
    files = [glob.escape(str(scratch / name)) for name in names]
    table = _load(origin, chosen, "train", path=reader, data_files=files, cache_dir=scratch / "cache", **options)
    if chosen == "conll":
        return _sentences(origin, table)
    return _lines(table) if chosen == "text" else table


def files_of(origin: Local | Wheel, format: str | None, *, images: bool = False) -> tuple[list[str], str]:
    """The files with rows, and their format. In a folder text files count where there are no others: they may be notes;
    and so do images, where they may be rows: else a table names them.

    Raises `SourceError` where nothing tells the format.
    """
    names = origin.names()
    if len(names) > 1 or (isinstance(origin, Local) and origin.path.is_dir()):
        known = (*READERS, IMAGES) if images else READERS
        names = [name for name in names if data_format(name) in ((format,) if format else known)]
        tables = [name for name in names if data_format(name) not in ("text", IMAGES)]
        names = tables or [name for name in names if data_format(name) == IMAGES] or names
    formats = {format or data_format(name) for name in names}
    if not images:
        formats = {None if found == IMAGES else found for found in formats}
    if len(formats) != 1 or None in formats:
        found = f"files of several formats ({', '.join(sorted(map(str, formats)))})" if formats else "no data file"
        raise SourceError(
            f"{origin} has an unknown format" if None in formats else f"{origin} has {found}",
            hint=f"set data.format to one of {', '.join(READERS)}, or use an ending such as {', '.join(DATA_SUFFIXES)}",
        )
    return names, str(formats.pop())


def _lines(documents: pa.Table) -> pa.Table:
    import pyarrow as pa

    texts = (text for chunk in documents["text"].iterchunks() for text in chunk.to_pylist())
    return pa.table({"text": pa.array((line for text in texts for line in text.split("\n")), pa.string())})


def _sentences(origin: Origin, documents: pa.Table) -> pa.Table:
    """Of files such as the CoNLL tasks have: a word a line, with its columns, and an empty line behind a sentence."""
    import pyarrow as pa

    sentences: list[list[list[str]]] = [[]]
    width = 0
    for text in documents["text"].to_pylist():
        tabs = "\t" in text
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                sentences.append([])
            elif not line.startswith("-DOCSTART-") and not (tabs and line.startswith("#") and "\t" not in line):
                cells = line.split("\t") if tabs else line.split()
                width = width or len(cells)
                if len(cells) != width or width < 2:
                    told = f"line {number} has {len(cells)} columns, not {max(width, 2)}"
                    raise SourceError(f"{origin} can't be read as conll: {told}")
                sentences[-1].append(cells)
        sentences.append([])
    columns = list(zip(*(zip(*sentence, strict=True) for sentence in sentences if sentence), strict=True))
    if not columns:
        raise SourceError(f"{origin} has no rows")
    named = {"tokens": columns[0], "tags": columns[-1], **{str(i): column for i, column in enumerate(columns)}}
    return pa.table({name: pa.array(map(list, column), pa.list_(pa.string())) for name, column in named.items()})


def _load(origin: Origin, what: str, split: str | None, **options: Any) -> pa.Table:
    import datasets

    # `datasets` has no error family: pandas', pyarrow's, fsspec's and the network's come through, each its own way.
    try:
        with _quiet():
            found = datasets.load_dataset(keep_in_memory=True, **options)
    except Exception as error:
        chain = list(_chain(error))
        for cause in chain:
            if isinstance(cause, OSError) and cause.errno is not None:
                raise cause from None
        hint = "set data.subset to one of them" if "onfig name is missing" in str(error) else None
        if any(isinstance(cause, UnicodeDecodeError) for cause in chain):
            hint = "save it as UTF-8"
        elif "corresponds to no data" in str(error) or isinstance(error, StopIteration):
            raise SourceError(f"{origin} has no rows") from error
        reason = str(chain[-1]).strip().split("\n")[0] or type(chain[-1]).__name__
        raise SourceError(f"{origin} can't be read as {what}: {reason}", hint=hint) from error
    names = list(found)
    name = split or ("train" if "train" in names or len(names) != 1 else names[0])
    if name not in names:
        hint = f"it has {', '.join(names)}: name one for each split, as in data.splits.evaluation: test"
        raise SourceError(f"{origin} has no split {name!r} to take rows from", hint=hint)
    table: pa.Table = found[name].data.table
    return table


def keep(table: pa.Table, wanted: Mapping[str, Any]) -> list[int]:
    """Numbers of the rows whose columns have the wanted value, or one of them.

    Raises `SourceError` for a column that is not there, a value of another type, and where no row is left.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = pa.array([True] * table.num_rows)
    for column, value in wanted.items():
        if column not in table.column_names:
            raise SourceError(
                f"the data has no column {column!r} to filter by",
                hint=_did_you_mean(column, table.column_names),
            )
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        type_ = table.schema.field(column).type
        if pa.types.is_string(type_) or pa.types.is_large_string(type_):
            values = [str(item) for item in values]
        try:
            choices = pa.array(values, type=type_)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
            raise SourceError(f"the filter on {column!r} wants {value!r}, but the column holds {type_}") from error
        kept = pc.and_(kept, pc.is_in(table[column], value_set=choices))
        if not pc.any(kept).as_py():
            present = [repr(item) for item in table[column].slice(0, 100_000).unique().to_pylist()[:8]]
            raise SourceError(
                f"no row is left by the filter {column}: {value}", hint=f"the column holds {', '.join(present)}, ..."
            )
    return [row for row, stays in enumerate(kept.to_pylist()) if stays]


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    listed = f"the columns are {', '.join(names)}"
    return f"did you mean {near[0]}? {listed}" if near else listed


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, the deepest last. What was merely being handled when it was raised is left out."""
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, which would draw over ours."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
