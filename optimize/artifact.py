"""Artifact: an immutable directory of plain files plus a manifest. `store.py` is where they live, addressed by content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
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
    """What the task needs to answer with it, such as {"name": "text-classification", "max_length": 128, "labels": [...]}."""
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
        sizes = {name: entry.st_size for name, entry in walk(path)}
        if not sizes:
            raise StoreError("no files to make an artifact of", location=str(path))
        hashes = _hashes(path, sizes)
        return cls(
            path=path,
            format=format,
            task=task,
            files={name: {"size": sizes[name], "sha256": hashes[name]} for name in sizes},
            details=details or {},
            trust_remote_code=trust_remote_code,
        )

    @classmethod
    def from_manifest(cls, path: Path, manifest: Any) -> Artifact:
        """The artifact that a manifest describes, whose files lie at `path`. Raises `StoreError` where it makes no sense."""
        try:
            if manifest["schema"] != 1:
                raise StoreError(
                    f"manifest of schema {manifest['schema']!r}; this version reads 1",
                    location=str(path),
                    hint="use a newer `optimize-workbench`",
                )
            files = {str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()}
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
        found: dict[str, int] = {}
        problems = []
        try:
            for name, entry in walk(self.path, refuse=problems):
                found[name] = entry.st_size
        except OSError as error:
            return [f"{error.strerror or error}: {error.filename or self.path}"]
        problems += [f"missing file: {name}" for name in sorted(self.files.keys() - found.keys())]
        problems += [f"extra file: {name}" for name in sorted(found.keys() - self.files.keys())]
        intact = []
        for name in sorted(self.files.keys() & found.keys()):
            if found[name] != self.files[name]["size"]:
                problems.append(f"size is {found[name]}, not {self.files[name]['size']}: {name}")
            else:
                intact.append(name)
        hashes = _hashes(self.path, {name: found[name] for name in intact}, problems)
        problems += [f"bytes have changed: {name}" for name in hashes if hashes[name] != self.files[name]["sha256"]]
        return problems

    def verify(self) -> None:
        """Check every byte against the manifest. Raises `StoreError` that names the damaged files."""
        if problems := self.problems():
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise StoreError(
                f"damaged artifact {self.digest[:19]}: {shown}",
                location=str(self.path),
                hint="remove it and run the recipe again; what is missing is made anew",
            )

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


def walk(path: Path, refuse: list[str] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """(relative POSIX path, stat) of every file below `path`, in order.

    Anything but a plain file or folder of a plain name raises `StoreError`; with `refuse`, it is noted there instead.
    A file that also has a name elsewhere (a hard link) can be changed from there: it is refused too, but not noted with
    `refuse`, which serves a check of bytes.
    """

    def refused(what: str, name: str) -> None:
        if refuse is None:
            raise StoreError(f"{what}: {name}", location=str(path), hint="only plain files and folders can be part of a model")
        refuse.append(f"{what}: {name}")

    if path.is_symlink() or not path.is_dir():
        return refused("not a folder", path.name)
    links: dict[tuple[int, int], list[str]] = {}
    counts: dict[tuple[int, int], int] = {}
    pending = [("", path)]
    while pending:
        prefix, folder = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if _NOT_PLAIN.search(entry.name):
                refused("not a plain name", ascii(name))
            elif stat.S_ISLNK(status.st_mode):
                refused("symbolic link", name)
            elif stat.S_ISDIR(status.st_mode):
                pending.append((name + "/", Path(entry.path)))
            elif stat.S_ISREG(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                links.setdefault(identity, []).append(name)
                counts[identity] = status.st_nlink
                yield name, status
            else:
                refused("special file", name)
    for identity, names in links.items():
        if refuse is None and counts[identity] > len(names):
            refused("hard link to a file outside", names[0])


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
        raise StoreError(f"not a plain relative path: {ascii(name)}", location=str(path))


def _hashes(path: Path, sizes: Mapping[str, int], unreadable: list[str] | None = None) -> dict[str, str]:
    """SHA-256 of each file, the largest first and several at a time (hashing releases the interpreter's lock)."""

    def one(name: str) -> str | None:
        try:
            return sha256_file(path / name)
        except OSError as error:
            if unreadable is None:
                raise StoreError(f"{error.strerror}: {name}", location=str(path)) from error
            unreadable.append(f"{error.strerror}: {name}")
            return None

    ordered = sorted(sizes, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(ordered, pool.map(one, ordered), strict=True))
    return {name: result for name in sorted(sizes) if (result := results[name]) is not None}
