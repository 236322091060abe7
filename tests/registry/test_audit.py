"""The log loses nothing, and shows when it was touched."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize import atomic
from optimize.artifact import digest_of
from optimize.errors import RegistryError
from optimize.registry.audit import AuditLog


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    log = AuditLog(tmp_path / "audit")
    for word in ("one", "two", "three"):
        log.append(lambda _, word=word: {"word": word})
    return log


def file(log: AuditLog, number: int) -> Path:
    return log.root / f"{number:08}.json"


def test_entries_are_numbered_chained_and_signed_with_who_when_and_where(log: AuditLog) -> None:
    entries = log.entries()
    assert [entry["word"] for entry in entries] == ["one", "two", "three"]
    assert [entry["number"] for entry in entries] == [1, 2, 3]
    assert entries[0]["previous"] is None
    assert all({"who", "host", "when", "seal"} <= entry.keys() for entry in entries)
    assert entries[0]["when"].endswith("+00:00")
    assert log.problems() == []


def test_nothing_to_add_adds_nothing(log: AuditLog) -> None:
    assert len(log.append(lambda _: None)) == 3
    assert len(list(log.root.iterdir())) == 3


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert AuditLog(tmp_path / "nothing").entries() == []
    assert list(tmp_path.iterdir()) == []


@given(number=st.integers(1, 3), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, number: int, place: float, bit: int
) -> None:
    log = AuditLog(tmp_path_factory.mktemp("log") / "audit")
    for word in ("one", "two", "three"):
        log.append(lambda _, word=word: {"word": word})
    data = bytearray(file(log, number).read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    file(log, number).write_bytes(data)
    assert any(f"{number:08}" in problem for problem in log.problems())
    with pytest.raises(RegistryError, match="changed or cut short"):
        log.append(lambda _: {"word": "four"})
    assert not file(log, 4).exists()


def test_an_entry_rewritten_with_care_breaks_the_chain(log: AuditLog) -> None:
    entry = json.loads(file(log, 2).read_bytes())
    del entry["seal"]
    entry["word"] = "forged"
    file(log, 2).write_bytes(atomic.json_bytes({**entry, "seal": digest_of(entry)}))
    (problem,) = log.problems()
    assert "00000003.json does not follow" in problem


def test_a_removed_inserted_or_swapped_entry_is_found(log: AuditLog) -> None:
    third = file(log, 3).read_bytes()
    second = file(log, 2).read_bytes()
    file(log, 2).unlink()
    assert log.problems() == ["entry 00000002.json is missing, but there is '00000003.json'"]
    file(log, 2).write_bytes(third)
    file(log, 3).write_bytes(second)
    assert len(log.problems()) == 2
    file(log, 2).write_bytes(second)
    file(log, 3).write_bytes(third)
    assert log.problems() == []
    (log.root / "zzz.json").write_text("{}")
    assert log.problems() == ["entry 00000004.json is missing, but there is 'zzz.json'"]


def test_what_a_kill_leaves_is_not_read(log: AuditLog) -> None:
    atomic.sibling(file(log, 4)).write_text("{")
    assert len(log.append(lambda _: {"word": "four"})) == 4
    assert log.problems() == []


def test_a_full_disk_adds_nothing(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RegistryError, match="disk is full"):
            log.append(lambda _: {"word": "four"})
    assert len(log.entries()) == 3
    assert len(list(log.root.iterdir())) == 3


def test_a_number_that_somebody_else_takes_is_not_lost(log: AuditLog) -> None:
    seen = []

    def make(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        seen.append(len(entries))
        if len(entries) == 3:
            AuditLog(log.root).append(lambda _: {"word": "faster"})
        return {"word": "slower"}

    entries = log.append(make)
    assert seen == [3, 4]
    assert [entry["word"] for entry in entries[3:]] == ["faster", "slower"]
    assert list(log.entries()) == list(entries)


def test_many_writers_beside_a_reader(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    problems = []
    stop = threading.Event()

    def write(number: int) -> None:
        for turn in range(8):
            AuditLog(log.root).append(lambda _, turn=turn: {"writer": number, "turn": turn})

    def read() -> None:
        while not stop.is_set():
            problems.extend(log.problems())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    reader.join()
    assert problems == []
    written = {(entry["writer"], entry["turn"]) for entry in log.entries()}
    assert written == {(writer, turn) for writer in range(4) for turn in range(8)}


def test_a_user_without_a_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    (entry,) = AuditLog(tmp_path / "audit").append(lambda _: {})
    assert entry["who"] == f"uid {os.getuid()}"
