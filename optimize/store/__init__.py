"""Where artifacts live: addressed by content, complete or absent, never changed.

    store/artifacts/<digest>/manifest.json, files/...   what was made
    store/keys/<key>.json                               which work gave which digest, and all that entered the key
    store/staging/<owner>-<random>/files                what is being made
    store/scratch/<key>/                                what unfinished work can go on from
    store/in-use/                                       processes at work and what they need (see `in_use.py`)
    store/damaged/                                      artifacts whose bytes had changed when they were made anew
    store/locks/                                        one lock a key

Everything appears by a rename of synced files, so that a kill at any moment leaves nothing half made. Locks save work,
and tell `gc` who is alive; no result rests on one. Where a file system gives a lock to everybody, two runs may do the
same work, and `gc` may take an artifact from under a run, whose next look then says that it is missing.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optimize import atomic
from optimize.artifact import Artifact
from optimize.errors import StoreError
from optimize.store.in_use import InUse, Owner
from optimize.store.records import Records, hex_of
from optimize.store.shelf import Shelf, entries

SCRATCH_SECONDS = 7 * 24 * 3600.0
"""Work that nobody went on with for so long is given up by `gc`."""


@dataclass(frozen=True)
class Problem:
    """Something in the store that is not as it was written."""

    path: Path
    message: str


@dataclass(frozen=True)
class Stored:
    """An artifact in the store and the work that gave it, the last used first."""

    artifact: Artifact
    records: tuple[Mapping[str, Any], ...]
    last_used: float
    """Seconds since the epoch; 0 where no record is left."""


@dataclass(frozen=True)
class Collected:
    """What `gc` removed, or would."""

    removed: tuple[str, ...]
    """Digests of artifacts."""
    freed_bytes: int
    """Of artifacts and of what lay in staging, scratch and damaged."""
    kept: int
    """Artifacts that stay."""


class Store:
    """Artifacts by digest, and digests by key. Keys and digests are `sha256:` and 64 hexadecimal digits."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self._shelf = Shelf(self.root / "artifacts", self.root / "damaged")
        self._records = Records(self.root / "keys")
        self._staging = self.root / "staging"
        self._scratch = self.root / "scratch"
        self._locks = self.root / "locks"
        self._in_use = InUse(self.root / "in-use")
        self._owner: Owner | None = None
        self._users = 0
        self._mutex = threading.RLock()

    # --- reading ------------------------------------------------------------------------------------------------------

    def record(self, key: str) -> dict[str, Any] | None:
        """What is known of the work of that key; None where it was never done, or its record is damaged."""
        return self._records.read(key)

    def records_for(self, recipe: str, stage: str) -> Sequence[dict[str, Any]]:
        """Records of a recipe's stage, both by name, the last made first."""
        found = [r for _, r in self._records.all() if (r.get("recipe"), r.get("stage")) == (recipe, stage)]
        return sorted(found, key=lambda record: str(record["created"]), reverse=True)

    def get(self, key: str) -> Artifact | None:
        """The artifact that the work of that key gave, or None where it must be done.

        Checks the manifest, not every byte (`verify` does). Raises `StoreError` where the manifest is damaged.
        """
        self._pin_for_reading(key)
        record = self.record(key)
        if record is None or not self._shelf.path(record["digest"]).is_dir():
            return None
        self._records.used(key)
        return self._shelf.open(record["digest"])

    def open(self, digest: str) -> Artifact:
        """The artifact of that digest, or of one that starts so (eight digits or more).

        Raises `StoreError` where there is none, more than one, or its manifest is damaged.
        """
        digest = self._shelf.complete(digest)
        self._pin_for_reading(digest)
        return self._shelf.open(digest)

    def has(self, digest: str) -> bool:
        """Whether there is an artifact of that digest; its bytes are not looked at."""
        return self._shelf.path(digest).is_dir()

    def has_one(self, start: str) -> bool:
        """Whether `open` would find an artifact by a digest, or by one that starts so."""
        try:
            return self.has(self._shelf.complete(start))
        except StoreError:
            return False

    def holds(self, digest: str) -> bool:
        """Whether an artifact of that digest is here with every byte as it was written; it is pinned then."""
        self._pin_for_reading(digest)
        return self.has(digest) and not self._shelf.problems_of(self._shelf.path(digest))

    def verify(self, artifact: Artifact) -> None:
        """Check every byte of an artifact. Raises `StoreError` that names the damaged file."""
        artifact.verify()

    def verify_all(self) -> Sequence[Problem]:
        """Everything in the store that is not as it was written. What unfinished work left behind is no problem."""
        return [Problem(path, message) for path, message in (*self._shelf.problems(), *self._records.problems())]

    def list(self) -> Sequence[Stored]:
        """Every artifact, the last used first. Raises `StoreError` at a damaged manifest."""
        records: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for used, record in sorted(self._records.all(), key=lambda pair: -pair[0]):
            records.setdefault(record["digest"], []).append((used, record))
        stored = []
        for digest in self._shelf.digests():
            of_this = records.get(digest, [])
            last_used = of_this[0][0] if of_this else 0.0
            stored.append(Stored(self._shelf.open(digest), tuple(record for _, record in of_this), last_used))
        return sorted(stored, key=lambda item: -item.last_used)

    # --- writing ------------------------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """A fresh empty folder in which to make an artifact. `publish` takes it, `discard` removes it."""
        with self._writing("making room for a new artifact"):
            path = self._staging / f"{self._register().id}-{secrets.token_hex(4)}" / "files"
            path.mkdir(parents=True)
        return path

    def discard(self, path: Path) -> None:
        """Remove a folder that `staging` gave, if it is still there."""
        atomic.remove(self._staged(path))

    def scratch(self, key: str) -> Path:
        """A folder that survives a kill, for work of that key; `publish` removes it."""
        path = self._scratch / hex_of(key)
        with self._writing("making room for unfinished work"):
            self._register().add(key)
            path.mkdir(parents=True, exist_ok=True)
            os.utime(path)
        return path

    def publish(self, key: str, artifact: Artifact, record: Mapping[str, Any]) -> Artifact:
        """Take an artifact that was made in a `staging` folder into the store, as the result of the work of that key.

        `record` is JSON about the work (what entered the key, recipe, stage, parent, seconds, ...); `schema`, `key`,
        `digest` and `created` (UTC) are added. Where the very same artifact is there already, it stays if its bytes are
        right, and otherwise goes to `damaged/`. Raises `StoreError` where files are not as described or can't be
        written (a full disk); then the staging folder is removed and the store is as before.
        """
        digest = artifact.digest
        staged = self._staged(artifact.path)
        prepared = staged.with_suffix(".record")
        created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            with self._writing(f"storing artifact {digest[:19]}", artifact.size_bytes):
                self._register().add(key, digest)
                self._shelf.settle(staged, artifact)
                entry = {"created": created, **record, "schema": 1, "key": key, "digest": digest}
                atomic.write_synced(prepared, atomic.json_bytes(entry))
                self._shelf.folder.mkdir(exist_ok=True)
                self._records.folder.mkdir(exist_ok=True)
                placed = self._shelf.place(staged, digest)  # from here on, nothing needs room
                try:
                    atomic.sync(self._shelf.folder)
                    prepared.replace(self._records.path(key))  # if a crash loses this name, the work is done again
                except OSError:
                    if placed:
                        self._shelf.path(digest).rename(staged)
                    raise
        finally:
            atomic.remove(staged)
            atomic.remove(prepared)
        atomic.remove(self._scratch / hex_of(key))
        return replace(artifact, path=self._shelf.path(digest) / "files")

    def adopt(self, artifact: Artifact) -> Artifact:
        """Take an artifact that came from elsewhere into the store, checked byte by byte; no work of ours made it.

        Its files lie in a `staging` folder, and what `scratch` kept under its digest is removed. Raises as `publish`.
        """
        digest = artifact.digest
        staged = self._staged(artifact.path)
        try:
            artifact.verify()
            with self._writing(f"storing artifact {digest[:19]}", artifact.size_bytes):
                self._register().add(digest)
                self._shelf.settle(staged, artifact)
                self._shelf.folder.mkdir(exist_ok=True)
                self._shelf.place(staged, digest)
                atomic.sync(self._shelf.folder)
        finally:
            atomic.remove(staged)
        atomic.remove(self._scratch / hex_of(digest))
        return replace(artifact, path=self._shelf.path(digest) / "files")

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Only one process at a time does the work of a key; others wait here, and then find it done with `get`.

        `on_wait` is called once, where somebody else has the lock.
        """
        with self._writing("taking a lock"):
            self._locks.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._locks / f"{hex_of(key)}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if on_wait:
                    on_wait()
                lock.acquire(poll_interval=0.1)
        try:
            yield
        finally:
            lock.release()

    # --- keeping and forgetting ---------------------------------------------------------------------------------------

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, `gc` of any process keeps whatever this store hands out or takes in.

        Without it, that holds until the process ends.
        """
        with self._writing("registering with the store"), self._mutex:
            self._owner = self._owner or self._in_use.register()
            self._users += 1
        try:
            yield
        finally:
            with self._mutex:
                self._users -= 1
                if not self._users and self._owner:
                    self._owner.release()
                    self._owner = None

    def gc(self, keep: Callable[[], AbstractSet[str]] = frozenset, *, dry_run: bool = False) -> Collected:
        """Remove every artifact that no live process has pinned and whose digest is not in what `keep` gives.

        `keep` is asked after the pins are read, so that what a process promotes just before it ends is in one of them.

        Also goes: records whose artifact is gone, what dead processes left in staging, damaged artifacts, and scratch
        folders that nobody has gone on with for a week. Raises `StoreError` where something can't be moved.
        """
        if not self.root.is_dir():
            return Collected((), 0, 0)
        with self.in_use():
            trash = self._staging / f"{self._register().id}-{secrets.token_hex(4)}"
            with self._writing("removing what nobody needs"), self._in_use.lock():
                owners = self._in_use.pinned()
                pins = {name for names in owners.values() for name in names}
                records = [record for _, record in self._records.all()]
                pins |= {record["digest"] for record in records if record["key"] in pins}
                artifacts = set(self._shelf.digests())
                removed = sorted(artifacts - pins - keep())
                kept = artifacts.difference(removed)
                garbage = [self._shelf.path(digest) for digest in removed] + entries(self._shelf.damaged)
                garbage += [path for path in entries(self._staging) if path.name.partition("-")[0] not in owners]
                garbage += [path for path in entries(self._scratch) if self._given_up(path, pins)]
                collected = Collected(tuple(removed), sum(map(_bytes_below, garbage)), len(kept))
                if dry_run:
                    return collected
                trash.mkdir(parents=True)
                for path in garbage:  # out of sight at once, each by a rename; deleting takes its time
                    path.rename(trash / f"{path.parent.name}-{path.name}")
                for record in records:
                    if record["digest"] not in kept and record["key"] not in pins:
                        self._records.path(record["key"]).unlink(missing_ok=True)
                self._in_use.forget(owners)
            atomic.remove(trash)
        return collected

    # --- within -------------------------------------------------------------------------------------------------------

    def _staged(self, path: Path) -> Path:
        if path.name != "files" or path.parent.parent != self._staging:
            raise StoreError("not a folder that `Store.staging` gave", location=str(path))
        return path.parent

    @contextmanager
    def _writing(self, doing: str, needed: int | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message, hint = atomic.explain(error, doing, self.root, needed)
            raise StoreError(message, hint=hint) from error

    def _register(self) -> Owner:
        with self._mutex:
            if self._owner is None:
                self._owner = self._in_use.register()
                self._users += 1  # nobody says when it is over, so it is until the process ends
            return self._owner

    def _pin_for_reading(self, name: str) -> None:
        """A store that can't be written can still be read: bytes are checked, pins only hold back `gc`."""
        if self.root.is_dir():
            with suppress(OSError), self._mutex:
                self._register().add(name)

    def _given_up(self, scratch: Path, pins: AbstractSet[str]) -> bool:
        return f"sha256:{scratch.name}" not in pins and time.time() - scratch.stat().st_mtime > SCRATCH_SECONDS


def _bytes_below(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())
