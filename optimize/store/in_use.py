"""Who is at work in a store, and what they need.

A process registers as an owner and names in `<owner>.json` each key and digest *before* it looks at it. The names are
written under one lock, which `gc` holds while it decides and moves things out of sight. So either the name came first
and `gc` sees it, or `gc` came first, the look finds nothing, and the work is done again. An owner is alive as long as
its own lock is held, which ends with the process, however it dies.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


class InUse:
    """The owners of a store; `folder` holds `<owner>.lock` and `<owner>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lock(self) -> FileLock:
        """Held to register, to pin, and by `gc` from its decision until things are out of sight."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    def register(self) -> Owner:
        with self.lock():
            return Owner(self)

    def pinned(self) -> dict[str, list[str]]:
        """Living owner -> keys and digests. Call with the lock held."""
        owners: dict[str, list[str]] = {}
        for path in self.folder.glob("[!.]*.lock"):
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                with suppress(FileNotFoundError):  # it has just ended
                    owners[path.stem] = json.loads(path.with_suffix(".json").read_bytes())["pins"]
        return owners

    def forget(self, living: dict[str, list[str]]) -> None:
        """Remove what dead owners left. Call with the lock held."""
        for path in self.folder.iterdir():
            if path.name != ".lock" and path.stem not in living:
                path.unlink(missing_ok=True)


class Owner:
    """A process at work: as long as it holds its lock, `gc` keeps what it has pinned."""

    def __init__(self, in_use: InUse) -> None:
        self.id = secrets.token_hex(8)
        self._in_use = in_use
        self._pins: set[str] = set()
        self._file = in_use.folder / f"{self.id}.json"
        self._lock = FileLock(self._file.with_suffix(".lock"), thread_local=False)
        self._lock.acquire(timeout=0)
        self._write(self._pins)

    def add(self, *names: str) -> None:
        """Pin keys or digests. Look at them afterwards, not before."""
        if not self._pins.issuperset(names):
            with self._in_use.lock():  # before the sum, or the names of another thread would be lost
                pins = self._pins.union(names)
                self._write(pins)
                self._pins = pins

    def release(self) -> None:
        self._lock.release()
        self._file.with_suffix(".lock").unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)

    def _write(self, pins: set[str]) -> None:
        """Whole, but not synced: it need not survive a crash of the machine, as its owner would not."""
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": os.getpid(), "pins": sorted(pins)}))
        temporary.replace(self._file)
