"""Artifact: an immutable directory of plain files plus a manifest. Where they live is `store.py`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optimize import atomic
from optimize.errors import StoreError

_NOT_PLAIN = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """`sha256:` and the hash of a JSON value's canonical form."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(1 << 20))
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A model as plain files, and what they are.

    `digest` is the SHA-256 of the manifest's canonical JSON; the manifest lists every file's SHA-256 and holds no time,
    host or path, so the same result has the same name on every machine.
    """

    path: Path
    """The folder of plain files: what ships."""
    format: str
    """`transformers`, `onnx`, ...: names the runtime that serves it."""
    task: Mapping[str, Any]
    """What the task needs to answer with it: {"name": "text-classification", "max_length": 128, "labels": [...]}."""
    files: Mapping[str, Mapping[str, Any]]
    """Relative POSIX path -> {"size": bytes, "sha256": hex}."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the stage found out: tolerances, advice, sensitivities. JSON; no time, host or path."""
    trust_remote_code: bool = False
    """Whether the recipe allowed the model's own code to run."""

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "format": self.format,
            "task": dict(self.task),
            "files": {name: dict(entry) for name, entry in sorted(self.files.items())},
            "details": dict(self.details),
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def size_bytes(self) -> int:
        """Every file that must ship."""
        return sum(int(entry["size"]) for entry in self.files.values())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from optimize.notebook import shown

        return shown.artifact(self)

    @classmethod
    def from_directory(
        cls,
        path: Path,
        *,
        format: str,
        task: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> Artifact:
        """Describe the files that lie below `path`. Links and special files are refused (`StoreError`)."""
        try:
            sizes = {name: status.st_size for name, status in walk(path)}
        except OSError as error:
            raise StoreError(f"{error.strerror}: {error.filename}", location=str(path)) from error
        if not sizes:
            raise StoreError("no files to make an artifact of", location=str(path))
        hashes, unreadable = _hashes(path, sizes)
        if unreadable:
            raise StoreError("; ".join(unreadable), location=str(path))
        return cls(
            path=path,
            format=format,
            task=task,
            files={name: {"size": sizes[name], "sha256": hashes[name]} for name in sorted(sizes)},
            details=details or {},
            trust_remote_code=trust_remote_code,
        )

    @classmethod
    def from_manifest(cls, path: Path, manifest: Any) -> Artifact:
        """What a manifest describes, with its files at `path`. Raises `StoreError` where it makes no sense."""
        try:
            if manifest["schema"] != 1:
                raise StoreError(
                    f"manifest of schema {manifest['schema']!r}; this version reads 1",
                    location=str(path),
                    hint="use a newer `optimize-workbench`",
                )
            files = {
                str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
                for name, entry in manifest["files"].items()
            }
            artifact = cls(
                path=path,
                format=str(manifest["format"]),
                task=dict(manifest["task"]),
                files=files,
                details=dict(manifest["details"]),
                trust_remote_code=manifest["trust_remote_code"] is True,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"malformed manifest ({type(error).__name__}: {error})", location=str(path)) from error
        for name in files:
            _check_name(name, path)
        return artifact

    def problems(self) -> list[str]:
        """Every way in which the files at `path` are not those of the manifest; reads every byte."""
        problems: list[str] = []
        try:
            found = {name: status.st_size for name, status in walk(self.path, refuse=problems.append)}
        except OSError as error:
            return [f"{error.strerror}: {error.filename}"]
        problems += [f"missing file: {name}" for name in sorted(self.files.keys() - found.keys())]
        problems += [f"extra file: {name}" for name in sorted(found.keys() - self.files.keys())]
        whole = {}
        for name in sorted(self.files.keys() & found.keys()):
            if found[name] == self.files[name]["size"]:
                whole[name] = found[name]
            else:
                problems.append(f"{found[name]} bytes, not {self.files[name]['size']}: {name}")
        hashes, unreadable = _hashes(self.path, whole)
        changed = sorted(name for name in hashes if hashes[name] != self.files[name]["sha256"])
        return problems + unreadable + [f"bytes have changed: {name}" for name in changed]

    def verify(self) -> None:
        """Check every byte against the manifest. Raises `StoreError` that names the damaged files."""
        if problems := self.problems():
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise StoreError(
                f"damaged artifact {self.digest[:19]}: {shown}",
                location=str(self.path),
                hint="remove it and run the recipe again; what is missing is made anew",
            )

    def copy_files(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Copy the files whose names are `wanted`, such as the tokenizer's, below a folder."""
        for name in filter(wanted, self.files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, folder / name)

    def export_to(self, folder: Path) -> Path:
        """Copy the model's files to a new folder, as plain writable files that serve without us.

        The folder appears whole or not at all; the copy is checked against the manifest. Raises `StoreError` where
        `folder` holds anything, where a byte differs, or where the disk is full.
        """
        folder = folder.absolute()
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise StoreError("not an empty folder", location=str(folder), hint="name a folder that does not exist yet")
        temporary = atomic.sibling(folder)
        try:
            for name in self.files:
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path / name, target, follow_symlinks=False)
            replace(self, path=temporary).verify()
            sync_tree(temporary)
            if folder.exists():
                folder.rmdir()  # empty; not every system renames onto a folder
            temporary.rename(folder)
            atomic.sync(folder.parent)
        except OSError as error:
            message, hint = atomic.explain(error, "copying the model", folder.parent, self.size_bytes)
            raise StoreError(message, hint=hint) from error
        finally:
            atomic.remove(temporary)
        return folder


def walk(path: Path, refuse: Callable[[str], None] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """(relative POSIX path, stat) of every file below `path`.

    Anything but a plain file or folder with a plain name raises `StoreError`, and so does a file that has a name
    outside as well (a hard link), since it can be changed from there. With `refuse`, that is told what is wrong
    instead, and hard links are let pass: that serves a check of bytes.
    """

    def refuse_all(what: str) -> None:
        hint = "only plain files and folders can be part of a model; copy what a link points to"
        raise StoreError(what, location=str(path), hint=hint)

    refused = refuse or refuse_all
    inside: dict[tuple[int, int], int] = {}
    linked: dict[tuple[int, int], tuple[str, int]] = {}
    pending = [("", path)]
    if path.is_symlink() or not path.is_dir():
        refused(f"not a folder: {path.name}")
        pending.clear()
    while pending:
        prefix, folder = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if _NOT_PLAIN.search(entry.name):
                refused(f"not a plain name: {name!a}")
            elif stat.S_ISLNK(status.st_mode):
                refused(f"symbolic link: {name}")
            elif stat.S_ISDIR(status.st_mode):
                pending.append((name + "/", Path(entry.path)))
            elif not stat.S_ISREG(status.st_mode):
                refused(f"neither a file nor a folder: {name}")
            else:
                if status.st_nlink > 1:
                    identity = (status.st_dev, status.st_ino)
                    inside[identity] = inside.get(identity, 0) + 1
                    linked[identity] = (name, status.st_nlink)
                yield name, status
    for identity, (name, count) in linked.items():
        if refuse is None and count > inside[identity]:
            refused(f"hard link to a file outside: {name}")


def sync_tree(path: Path) -> None:
    """Wait until every file and folder below `path`, and `path` itself, are on the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            atomic.sync(Path(folder) / name)
        atomic.sync(Path(folder))


def _check_name(name: str, path: Path) -> None:
    """Only names that stay below the folder, on every system."""
    parts = name.split("/")
    if _NOT_PLAIN.search(name) or any(part in ("", ".", "..") for part in parts) or re.match(r"[A-Za-z]:", name):
        raise StoreError(f"not a plain relative path: {name!a}", location=str(path))


def _hashes(path: Path, sizes: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """(name -> SHA-256, what could not be read); several at a time, since hashing frees the interpreter."""

    def one(name: str) -> str | OSError:
        try:
            return sha256_file(path / name)
        except OSError as error:
            return error

    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(zip(ordered, pool.map(one, ordered), strict=True))
    unreadable = [f"{result.strerror}: {name}" for name, result in results if isinstance(result, OSError)]
    return {name: result for name, result in results if isinstance(result, str)}, unreadable
