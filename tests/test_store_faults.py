"""Kills, full disks and failing calls: the store is as before, or has one more whole artifact."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from optimize import atomic
from optimize.artifact import Artifact, digest_of
from optimize.errors import StoreError
from optimize.store import Store


def make(store: Store, data: bytes = b"x" * 1000) -> Artifact:
    folder = store.staging()
    (folder / "deep").mkdir()
    (folder / "deep" / "model").write_bytes(data)
    (folder / "config.json").write_text("{}")
    return Artifact.from_directory(folder, format="onnx", task={})


def state(store: Store) -> dict[str, bytes]:
    """Every file but locks and pins, which hold nothing that lasts."""
    files = (path for path in sorted(store.root.rglob("*")) if path.is_file())
    named = ((path.relative_to(store.root).as_posix(), path) for path in files)
    return {name: path.read_bytes() for name, path in named if not name.startswith(("in-use/", "locks/"))}


PUBLISHER = """
import sys
from optimize.artifact import Artifact, digest_of
from optimize.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
for number in range(10**9):
    key = digest_of([sys.argv[2], number % 50])
    with store.in_use(), store.lock(key):
        folder = store.staging()
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(b"%d %s" % (number % 25, name.encode()) * 2000)
        (store.scratch(key) / "checkpoint").write_bytes(b"x")
        artifact = Artifact.from_directory(folder, format="onnx", task={})
        store.publish(key, artifact, {"recipe": "r", "stage": "s"})
        if number % 7 == 0:
            store.gc()
"""


def test_a_kill_at_any_moment_leaves_a_store_that_verifies(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    chance = random.Random(0)
    published = 0
    for number in range(15):
        command = [sys.executable, "-c", PUBLISHER, str(store.root), str(number % 2)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as publisher:
            assert publisher.stdout is not None
            assert publisher.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.12))
            publisher.send_signal(signal.SIGKILL)
        assert store.verify_all() == []
        published += len(store.list())
    assert published > 0
    store.gc()
    assert [path for path in state(store) if not path.startswith("scratch/")] == []


class FailsOnce:
    """A call that finds the disk full the `turn`-th time, counted from 0."""

    def __init__(self, real: Callable[..., object], turn: int) -> None:
        self.real, self.left = real, turn

    def __call__(self, *args: object) -> object:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(*args)


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "chmod")])
def test_a_full_disk_at_any_step_leaves_the_store_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    store = Store(tmp_path / "store")
    with store.in_use():
        store.publish(digest_of("before"), make(store, b"before"), {})
        before = state(store)
        turn = 0
        while store.get(digest_of("new")) is None:
            artifact = make(store)
            with monkeypatch.context() as patch:
                step = FailsOnce(getattr(owner, name), turn)
                # A plain function, so that a method is still handed its object.
                patch.setattr(owner, name, lambda *args, step=step: step(*args))
                try:
                    store.publish(digest_of("new"), artifact, {})
                except StoreError:
                    assert state(store) == before
                else:
                    assert store.get(digest_of("new")) is not None
            assert store.verify_all() == []
            turn += 1
        assert turn > 1, "at least one step must have failed"


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    artifact = make(store, b"x" * 2_000_000)
    monkeypatch.setattr(os, "fsync", FailsOnce(os.fsync, 0))
    with pytest.raises(StoreError, match=r"the disk is full \(2\.0 MB needed\): .*store, [\d,.]+ MB free") as caught:
        store.publish(digest_of("new"), artifact, {})
    assert caught.value.exit_code == 4
    assert "gc" in str(caught.value.hint)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not allowed to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny: Path) -> None:
    store = Store(tiny / "store")
    with store.in_use():
        kept = store.publish(digest_of("a"), make(store, b"k" * 100_000), {})
        artifact = make(store, b"x" * 700_000)
        filler = tiny / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        with pytest.raises(StoreError, match=r"disk is full \(0\.7 MB needed\).*MB free"):
            store.publish(digest_of("b"), artifact, {})
        assert store.verify_all() == []
        assert store.get(digest_of("b")) is None
        store.verify(kept)
        filler.unlink()
        whole = store.publish(digest_of("b"), make(store, b"x" * 700_000), {})
        store.verify(whole)
        kept.export_to(tiny / "out")
        with pytest.raises(StoreError, match="copying the model failed: the disk is full"):
            store.open(whole.digest).export_to(tiny / "more")
        assert {path.name for path in tiny.iterdir()} == {"store", "out"}


LIMITED = """
import resource, signal, sys
from optimize.artifact import Artifact, digest_of
from optimize.errors import StoreError
from optimize.store import Store
store = Store(sys.argv[1])
folder = store.staging()
for number in range(300):
    (folder / f"a-file-whose-name-makes-the-manifest-long-{number}").write_bytes(b"x")
artifact = Artifact.from_directory(folder, format="onnx", task={})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.publish(digest_of("a"), artifact, {})
except StoreError as error:
    print(error)
"""


def test_a_file_size_limit(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    command = [sys.executable, "-c", LIMITED, str(store.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "a file size limit was reached" in done.stdout
    assert "free some space" in done.stdout
    assert done.stderr == ""
    assert state(store) == {}


def test_write_json_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "run.json"
    atomic.write_json(path, {"b": 1, "a": "é"})
    assert path.read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_json(path, {"c": 2})
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(path, {"d": float("nan")})
    assert '"b": 1' in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("links", [True, False])
def test_create_succeeds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    atomic.create(tmp_path / "1", b"first")
    with pytest.raises(FileExistsError):
        atomic.create(tmp_path / "1", b"second")
    assert (tmp_path / "1").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]
