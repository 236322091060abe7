"""An append-only log: numbered files, each made exclusively and naming the hash of the one before.

    00000001.json  {"number": 1, "previous": null, ..., "seal": "sha256:..."}
    00000002.json  {"number": 2, "previous": "sha256 of 00000001.json's bytes", ...}

Several processes may append at once: a number is taken by whoever links a whole, synced file to that name first; the
others look at what is new and try the next. A kill or a full disk leaves at most a hidden temporary file, which nobody
reads. A changed, missing or inserted entry breaks the chain; `seal`, the hash of the entry itself, also guards the last
one against accidents. Cutting off the end of the log is the one thing it can't show: keep the last hash elsewhere where
that matters.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from optimize import atomic
from optimize.artifact import digest_of
from optimize.errors import RegistryError

Entry = dict[str, Any]


class AuditLog:
    """The entries below one folder, oldest first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self) -> Sequence[Entry]:
        """Every entry, checked. Raises `RegistryError` that names the first file that is not as it was written."""
        return self._whole()[0]

    def problems(self) -> list[str]:
        """Everything that is wrong with the log."""
        return self._read()[2]

    def files(self) -> Sequence[bytes]:
        """The bytes of every entry, oldest first, checked as by `entries`."""
        return [self._path(number).read_bytes() for number in range(1, len(self.entries()) + 1)]

    def extend(self, files: Sequence[bytes]) -> None:
        """Add entries that were written elsewhere, byte by byte, behind those that are here.

        Raises `RegistryError` where one does not follow the one before it, or somebody else was faster.
        """
        entries, previous = self._whole()
        follow(files, len(entries), previous)
        for number, data in enumerate(files, len(entries) + 1):
            try:
                atomic.create(self._path(number), data)
            except FileExistsError as error:
                raise RegistryError(
                    f"entry {number} was written here at this moment", location=str(self.root), hint="try again"
                ) from error
            except OSError as error:
                message, hint = atomic.explain(error, "writing to the registry", self.root)
                raise RegistryError(message, hint=hint) from error

    def set_aside(self) -> Path:
        """Rename the folder of the log, which begins anew. Returns where the old one is."""
        aside = self.root.with_name(f"{self.root.name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}")
        self.root.rename(aside)
        return aside

    def append(self, make: Callable[[Sequence[Entry]], Mapping[str, Any] | None]) -> Sequence[Entry]:
        """Add what `make` gives for the log as it is (None adds nothing); returns the log as it is then.

        `make` is called again where somebody else was faster. Number, who, when and on which host are added here.
        Raises `RegistryError` where the log is damaged or can't be written; then nothing has been added.
        """
        while True:
            entries, previous = self._whole()
            content = make(entries)
            if content is None:
                return entries
            entry = {
                **content,
                "number": len(entries) + 1,
                "previous": previous,
                "who": _user(),
                "host": platform.node(),
                "when": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            }
            entry["seal"] = digest_of(entry)
            try:
                atomic.create(self._path(entry["number"]), atomic.json_bytes(entry))
            except FileExistsError:
                continue
            except OSError as error:
                message, hint = atomic.explain(error, "writing to the registry", self.root)
                raise RegistryError(message, hint=hint) from error
            return [*entries, entry]

    def _whole(self) -> tuple[list[Entry], str | None]:
        entries, last, problems = self._read()
        if problems:
            hint = "the log was changed or cut short after it was written: restore that file from a backup"
            raise RegistryError(problems[0], location=str(self.root), hint=hint)
        return entries, last

    def _path(self, number: int) -> Path:
        return self.root / f"{number:08}.json"

    def _read(self) -> tuple[list[Entry], str | None, list[str]]:
        """(whole entries, hash of the last file, what is wrong)."""
        entries: list[Entry] = []
        problems = []
        previous = None
        number = 1
        while True:
            path = self._path(number)
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                # Listed before looking again: where a later one is listed, this one must have been there.
                later = sorted(other.name for other in self.root.glob("[!.]*") if other.name >= path.name)
                if path.exists():
                    continue
                problems += [f"entry {path.name} is missing, but there is {later[0]!a}"] if later else []
                return entries, previous, problems
            entry = _parse(data, number)
            if entry is None:
                problems.append(f"entry {path.name} has been changed or cut short")
            elif entry["previous"] != previous:
                problems.append(f"entry {path.name} does not follow the one before it, which was changed or replaced")
            else:
                entries.append(entry)
            previous = _hash(data)
            number += 1


def follow(files: Sequence[bytes], number: int, previous: str | None) -> list[Entry]:
    """The entries in these files, which follow the one of that number and hash. Raises `RegistryError`."""
    entries = []
    for data in files:
        number += 1
        entry = _parse(data, number)
        if entry is None:
            raise RegistryError(f"entry {number} of the log has been changed or cut short")
        if entry["previous"] != previous:
            raise RegistryError(f"entry {number} of the log does not follow the one before it")
        entries.append(entry)
        previous = _hash(data)
    return entries


def _parse(data: bytes, number: int) -> Entry | None:
    """The entry, if its bytes are what was written."""
    try:
        entry = json.loads(data)
        sealed = {key: value for key, value in entry.items() if key != "seal"}
        whole = entry["seal"] == digest_of(sealed) and entry["number"] == number and "previous" in entry
        return entry if whole and atomic.json_bytes(entry) == data else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _hash(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user need not have a name
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"
