"""What the store keeps, finds, checks and forgets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimize.artifact import Artifact, digest_of
from optimize.errors import StoreError
from optimize.store import SCRATCH_SECONDS, Store
from optimize.store.in_use import InUse

FILES = {"model.onnx": b"graph", "deep/weights.bin": b"\x01" * 4096}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def key(name: object) -> str:
    return digest_of(name)


def make(store: Store, files: dict[str, bytes] = FILES) -> Artifact:
    folder = store.staging()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Artifact.from_directory(folder, format="onnx", task={"name": "t"})


def put(store: Store, name: object, files: dict[str, bytes] = FILES, **record: Any) -> Artifact:
    return store.publish(key(name), make(store, files), record)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(store: Store) -> dict[str, bytes]:
    """All that counts: artifacts and records."""
    return {name: data for name, data in contents(store.root).items() if name.startswith(("artifacts/", "keys/"))}


def test_publish_then_get(store: Store) -> None:
    assert store.get(key("a")) is None
    assert store.record(key("a")) is None
    published = put(store, "a", recipe="r", stage="s", seconds=1.5)
    assert store.get(key("a")) == published == store.open(published.digest)
    assert published.path == store.root / "artifacts" / published.digest[7:] / "files"
    assert contents(published.path) == FILES
    record = store.record(key("a"))
    assert record is not None
    assert (record["key"], record["digest"]) == (key("a"), published.digest)
    assert (record["recipe"], record["stage"], record["seconds"]) == ("r", "s", 1.5)
    assert list((store.root / "staging").iterdir()) == []
    assert store.verify_all() == []
    store.verify(published)


def test_published_files_are_read_only(store: Store) -> None:
    for path in put(store, "a").path.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o444


def test_two_keys_may_give_the_same_artifact(store: Store) -> None:
    first = put(store, "a")
    inode = (first.path / "model.onnx").stat().st_ino
    assert put(store, "b") == first
    assert (first.path / "model.onnx").stat().st_ino == inode
    assert [len(stored.records) for stored in store.list()] == [2]


def test_publishing_again_mends_a_damaged_artifact(store: Store) -> None:
    path = put(store, "a").path / "model.onnx"
    path.chmod(0o644)
    path.write_bytes(b"grapH")
    again = put(store, "a")
    store.verify(again)
    assert contents(again.path) == FILES
    (aside,) = (store.root / "damaged").iterdir()
    assert (aside / "files" / "model.onnx").read_bytes() == b"grapH"


@pytest.mark.parametrize("wreck", [lambda p: shutil.rmtree(p / "files"), lambda p: (p / "manifest.json").unlink()])
def test_publishing_again_mends_a_torn_artifact(store: Store, wreck: Callable[[Path], None]) -> None:
    wreck(put(store, "a").path.parent)
    store.verify(put(store, "a"))
    assert store.verify_all() == []


def test_only_a_staging_folder_can_be_published(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "files"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"x")
    artifact = Artifact.from_directory(folder, format="onnx", task={})
    with pytest.raises(StoreError, match="not a folder that"):
        store.publish(key("a"), artifact, {})
    assert (folder / "x").exists()


def test_files_that_changed_since_they_were_described_are_not_published(store: Store) -> None:
    artifact = make(store)
    (artifact.path / "model.onnx").write_bytes(b"longer than before")
    with pytest.raises(StoreError, match="have changed"):
        store.publish(key("a"), artifact, {})
    assert snapshot(store) == {}
    assert list((store.root / "staging").iterdir()) == []


def test_discard_removes_staging_and_nothing_else(store: Store, tmp_path: Path) -> None:
    artifact = put(store, "a")
    folder = store.staging()
    (folder / "x").write_bytes(b"x")
    store.discard(folder)
    store.discard(folder)
    assert list((store.root / "staging").iterdir()) == []
    for path in (artifact.path, tmp_path):
        with pytest.raises(StoreError, match="not a folder that"):
            store.discard(path)


@given(name=st.text(max_size=80) | st.from_regex(r"sha256:[0-9a-fA-F./]{60,64}\n?", fullmatch=True))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_digests_become_paths(store: Store, name: str) -> None:
    for use in (store.get, store.record, store.scratch):
        if name.removeprefix("sha256:").strip("0123456789abcdef") or len(name.removeprefix("sha256:")) != 64:
            with pytest.raises(StoreError, match="not a SHA-256 digest"):
                use(name)
    with pytest.raises(StoreError):
        store.open(name)


@given(
    st.dictionaries(
        st.lists(
            st.from_regex(r"[a-zA-Z0-9_. -]{1,6}", fullmatch=True).filter(lambda part: part.strip(".")),
            min_size=1,
            max_size=3,
        ).map("/".join),
        st.binary(max_size=64),
        min_size=1,
        max_size=4,
    ).filter(lambda files: not any(a != b and b.startswith(a + "/") for a in files for b in files))
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plain_tree_comes_back_as_it_was(store: Store, files: dict[str, bytes]) -> None:
    artifact = put(store, sorted(files), files)
    found = store.open(artifact.digest)
    store.verify(found)
    assert contents(found.path) == files
    assert put(store, "again", files).digest == artifact.digest


def test_open_by_the_start_of_a_digest(store: Store) -> None:
    artifact = put(store, "a")
    assert store.open(artifact.digest[:15]) == artifact
    assert store.open(artifact.digest[7:]) == artifact
    with pytest.raises(StoreError, match="no artifacts start with"):
        store.open("sha256:00000000")
    with pytest.raises(StoreError, match="no artifact sha256:0000"):
        store.open("sha256:" + "0" * 64)


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found_and_named(store: Store) -> None:
    artifact = put(store, "a")
    put(store, "b", {"fine": b"fine"})
    flip(artifact.path / "deep" / "weights.bin")
    with pytest.raises(StoreError, match=r"bytes have changed: deep/weights\.bin"):
        store.verify(artifact)
    (problem,) = store.verify_all()
    assert problem.message == "bytes have changed: deep/weights.bin"
    assert problem.path == artifact.path.parent


def test_every_kind_of_damage_is_a_problem(store: Store) -> None:
    folder = put(store, "a").path.parent
    (folder / "files" / "extra").write_bytes(b"")
    (folder / "files" / "link").symlink_to("model.onnx")
    (folder / "notes").write_text("")
    (folder / "model.onnx").symlink_to("files/model.onnx")
    (store.root / "artifacts" / "strange").mkdir()
    (store.root / "artifacts" / ("0" * 64)).symlink_to(folder)
    (store.root / "keys" / "strange.json").write_text("{")
    (store.root / "keys" / f"{'1' * 64}.json").write_text(json.dumps(store.record(key("a"))))
    assert sorted(problem.message.split(" (")[0] for problem in store.verify_all()) == [
        "extra file beside the manifest: 'model.onnx'",
        "extra file beside the manifest: 'notes'",
        "extra file: extra",
        "malformed record",
        "malformed record",
        "not an artifact's folder",
        "not an artifact's folder",
        "symbolic link: 'model.onnx'",
        "symbolic link: link",
    ]


def test_a_changed_manifest_is_refused(store: Store) -> None:
    path = put(store, "a").path.parent / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"onnx"', '"openvino"'))
    with pytest.raises(StoreError, match=r"manifest\.json has changed"):
        store.get(key("a"))
    path.write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json can't be read"):
        store.get(key("a"))


def test_a_damaged_record_means_that_the_work_is_done_again(store: Store) -> None:
    artifact = put(store, "a")
    (store.root / "keys" / f"{key('a')[7:]}.json").write_bytes(b"\xff{")
    assert store.get(key("a")) is None
    assert put(store, "a") == artifact == store.get(key("a"))


def test_a_removed_artifact_means_that_the_work_is_done_again(store: Store) -> None:
    artifact = put(store, "a")
    shutil.rmtree(artifact.path.parent)
    assert store.get(key("a")) is None
    assert store.record(key("a")) is not None
    assert store.verify_all() == []


def test_a_store_that_cannot_be_written_can_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = put(store, "a")
    other = Store(store.root)

    def refuse(self: object) -> None:
        raise PermissionError

    monkeypatch.setattr("optimize.store.in_use.InUse.register", refuse)
    assert other.get(key("a")) == artifact


# --- looking back -----------------------------------------------------------------------------------------------------


def test_records_of_a_stage_come_newest_first(store: Store) -> None:
    for epochs in (1, 2, 3):
        put(store, epochs, recipe="r", stage="teacher", inputs={"epochs": epochs}, created=f"2026-01-0{epochs}")
    put(store, "other", recipe="r", stage="student")
    put(store, "another", recipe="q", stage="teacher")
    found = store.records_for("r", "teacher")
    assert [record["inputs"]["epochs"] for record in found] == [3, 2, 1]
    assert store.records_for("r", "nothing") == []


def test_get_is_noted_as_use(store: Store) -> None:
    old, new = put(store, "old", {"x": b"old"}), put(store, "new", {"x": b"new"})
    for path in (store.root / "keys").iterdir():
        os.utime(path, (1, 1))
    store.get(key("old"))
    assert [stored.artifact for stored in store.list()] == [old, new]
    assert store.list()[1].last_used == 1


# --- locks ------------------------------------------------------------------------------------------------------------


def test_the_same_key_waits_and_another_does_not(store: Store) -> None:
    waited = threading.Event()
    order = []

    def other() -> None:
        with Store(store.root).lock(key("a"), on_wait=waited.set):
            order.append("second")

    with store.lock(key("a")), store.lock(key("b")):
        thread = threading.Thread(target=other)
        thread.start()
        assert waited.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


# --- gc ---------------------------------------------------------------------------------------------------------------


def test_gc_removes_what_nobody_needs(store: Store) -> None:
    with store.in_use():
        kept, gone = put(store, "kept", {"x": b"kept"}), put(store, "gone", {"x": b"gone" * 1000})
    would = store.gc(lambda: {kept.digest}, dry_run=True)
    assert would.removed == (gone.digest,)
    assert would.freed_bytes > 4000
    assert gone.path.exists()
    assert store.gc(lambda: {kept.digest}) == would
    assert not gone.path.exists()
    assert store.record(key("gone")) is None
    assert store.get(key("kept")) == kept
    assert list((store.root / "staging").iterdir()) == []
    assert store.verify_all() == []


def test_gc_keeps_what_is_in_use_here(store: Store) -> None:
    with store.in_use():
        published = put(store, "a")
    other = Store(store.root)
    with store.in_use():
        store.get(key("a"))
        staged = store.staging()
        assert other.gc().kept == 1
        assert published.path.exists()
        assert staged.exists()
        with store.in_use():
            pass
        assert other.gc().kept == 1, "the inner `in_use` must not end the outer one"
    assert other.gc().removed == (published.digest,)
    assert not staged.exists()


def test_threads_pin_at_once(store: Store) -> None:
    with store.in_use():
        threads = [threading.Thread(target=store.scratch, args=(key(number),)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_use = InUse(store.root / "in-use")
        with in_use.lock():
            (pins,) = in_use.pinned().values()
    assert set(pins) == {key(number) for number in range(8)}


def test_what_was_handed_out_without_in_use_is_kept_until_the_process_ends(store: Store) -> None:
    artifact = put(store, "a")
    with store.in_use():
        pass
    assert store.gc().kept == Store(store.root).gc().kept == 1
    store.verify(artifact)


def test_gc_forgets_damaged_and_old_scratch_but_not_fresh_scratch(store: Store) -> None:
    with store.in_use():
        flip(put(store, "a").path / "model.onnx")
        artifact = put(store, "a")
        fresh, old = store.scratch(key("fresh")), store.scratch(key("old"))
        (old / "checkpoint").write_bytes(b"x")
        long_ago = time.time() - SCRATCH_SECONDS - 10
        os.utime(old, (long_ago, long_ago))
        store.gc()
        assert old.exists(), "its process is alive"
    store.gc(lambda: {artifact.digest})
    assert fresh.exists()
    assert not old.exists()
    assert list((store.root / "damaged").iterdir()) == []
    store.verify(artifact)


def test_gc_keeps_what_is_promoted_while_it_looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.in_use():
        artifact = put(store, "a")
    promoted = set()
    real = InUse.pinned

    def pinned(in_use: InUse) -> dict[str, list[str]]:
        found = real(in_use)
        promoted.add(artifact.digest)
        return found

    monkeypatch.setattr(InUse, "pinned", pinned)
    assert store.gc(lambda: promoted).kept == 1


def test_gc_of_nothing(store: Store) -> None:
    assert store.gc().removed == ()
    assert not store.root.exists()


HOLDER = """
import sys, time
from optimize.store import Store
store = Store(sys.argv[1])
with store.in_use():
    store.get(sys.argv[2])
    store.staging()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_gc_keeps_what_another_process_uses_until_it_dies(store: Store) -> None:
    with store.in_use():
        artifact = put(store, "a")
    command = [sys.executable, "-c", HOLDER, str(store.root), key("a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        (staged,) = (store.root / "staging").iterdir()
        assert store.gc().kept == 1
        assert staged.exists()
        store.verify(artifact)
        holder.kill()
    assert store.gc().removed == (artifact.digest,)
    assert not staged.exists()
    assert [path.name for path in (store.root / "in-use").iterdir()] == [".lock"]


def test_gc_beside_readers_and_writers(store: Store) -> None:
    """Whoever was handed an artifact can read it, whatever `gc` does at the same time."""
    failures: list[BaseException] = []
    stop = threading.Event()

    def work(number: int) -> None:
        try:
            own = Store(store.root)
            for turn in range(12):
                with own.in_use():
                    name = turn % 3
                    artifact = own.get(key(name)) or put(own, name, {"x": b"%d" % name * 500})
                    own.verify(artifact)
        except BaseException as error:
            failures.append(error)

    def collect() -> None:
        try:
            while not stop.is_set():
                Store(store.root).gc()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    collectors = [threading.Thread(target=collect) for _ in range(2)]
    for thread in (*collectors, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    for thread in collectors:
        thread.join(60)
    assert failures == []
    assert store.verify_all() == []


def test_scratch_is_the_same_until_it_is_published(store: Store) -> None:
    folder = store.scratch(key("a"))
    (folder / "checkpoint").write_bytes(b"half")
    assert (Store(store.root).scratch(key("a")) / "checkpoint").read_bytes() == b"half"
    put(store, "a")
    assert not folder.exists()
