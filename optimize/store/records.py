"""What is known of work that was done: one JSON file a key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimize.errors import StoreError

_HEX = re.compile(r"[0-9a-f]{64}")


def is_hex(text: str) -> bool:
    return _HEX.fullmatch(text) is not None


def hex_of(name: str) -> str:
    """The hexadecimal digits of a key or digest, safe as a file's name. Raises `StoreError` for anything else."""
    digits = name.removeprefix("sha256:")
    if not is_hex(digits):
        raise StoreError(f"not a SHA-256 digest: {name!r}", hint="it looks like sha256:0123... with 64 digits")
    return digits


class Records:
    """`<key>.json` below one folder; each holds at least `key`, `digest` and `created`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{hex_of(key)}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """None where there is none, or it is damaged: then the work is done again, and writes it anew."""
        return self._check(self.path(key))[0]

    def used(self, key: str) -> None:
        """Note that the result was needed now, as the file's time."""
        with suppress(OSError):
            os.utime(self.path(key))

    def all(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """(last use in seconds since the epoch, record) of each that is whole."""
        for path in self._paths():
            record, _ = self._check(path)
            if record is not None:
                with suppress(FileNotFoundError):
                    yield path.stat().st_mtime, record

    def problems(self) -> Iterator[tuple[Path, str]]:
        for path in self._paths():
            _, message = self._check(path)
            if message:
                yield path, message

    def _paths(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _check(self, path: Path) -> tuple[dict[str, Any] | None, str]:
        """(record, what is wrong with it)."""
        try:
            record = json.loads(path.read_bytes())
            hex_of(record["digest"])
            if f"{hex_of(record['key'])}.json" != path.name:
                raise ValueError(f"it is of another key: {record['key']}")
            if not isinstance(record["created"], str):
                raise TypeError("`created` is no text")
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StoreError) as error:
            return None, f"malformed record ({type(error).__name__}: {error})"
        return record, ""
