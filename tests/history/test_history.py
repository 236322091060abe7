"""The history: what is written and asked, and that nothing which befalls the database befalls a run."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from written_runs import HOST, SETTING, document, failed, run_id, write

from optimize import history
from optimize.errors import HistoryError, RecipeError
from optimize.history import catch_up, import_runs, open_history, quick, record
from optimize.history.database import opened
from optimize.history.query import Filters, known, runs, spark, trend
from optimize.history.rows import SCHEMA, TABLES, fingerprint_of, rows_of, started
from optimize.work import Work


@pytest.fixture(autouse=True)
def _no_other_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(history.VARIABLE, raising=False)


def tables(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that is in a file, asked without SQLAlchemy."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in TABLES}


@pytest.fixture
def told() -> list[str]:
    return []


def ids(work: Work, tell: Callable[[str], object], filters: Filters | None = None) -> list[str]:
    with open_history(work, tell=tell) as found:
        return [one["run"] for one in found.read(lambda session: runs(session, filters or Filters()))]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_quick_write_and_sqlalchemy_write_the_same(tmp_path: Path) -> None:
    one, other = tmp_path / "one.db", tmp_path / "other.db"
    for path in (one, other):
        with opened(f"sqlite:///{path}") as made:
            assert made.fresh
    documents = [document(1), failed(2), document(3, run="an id of my own")]
    with opened(f"sqlite:///{one}") as slow:
        assert slow.add(documents) == 3
    assert all(quick.add(other, rows_of(told)) for told in documents)
    written = tables(one)
    assert written == tables(other)
    assert [len(written[name]) for name in TABLES] == [3, 5, 55, 2, 4]
    with opened(f"sqlite:///{other}") as read:
        (stored,) = read.read(lambda session: runs(session, Filters(recipe="pico", limit=1)))
    assert stored["run"] == "an id of my own"
    assert stored["started"] is None


def test_recording_twice_changes_nothing_and_the_last_word_counts(work: Work, told: list[str]) -> None:
    for one in (document(1), document(1), document(2)):
        write(work.runs, one) if not (work.runs / one["run"]).exists() else None
        record(work, one, told.append)
    before = tables(work.history)
    record(work, document(2), told.append)
    assert tables(work.history) == before
    record(work, document(2, verdict="fail", exit_code=1), told.append)
    assert [row[5] for row in tables(work.history)[TABLES[0]]] == ["pass", "fail"]
    assert told == []


def test_the_first_write_catches_up(work: Work, told: list[str]) -> None:
    for number in range(3):
        write(work.runs, document(number))
    record(work, document(2), told.append)
    assert len(tables(work.history)[TABLES[0]]) == 3


def _record_some(root: str, first: int) -> None:
    for number in range(first, first + 10):
        record(Work(root), document(number), lambda message: print(message, file=sys.stderr))
        record(Work(root), document(99), lambda message: print(message, file=sys.stderr))


def test_processes_write_at_once_without_loss(work: Work, capfd: Any) -> None:
    """Also where there is no database yet: one makes it, and all write."""
    work.root.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_some, args=(str(work.root), 100 * part)) for part in range(1, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert capfd.readouterr().err == ""
    written = tables(work.history)
    assert len(written[TABLES[0]]) == 31
    assert len(written["optimize_gates"]) == 62


def test_the_end_of_a_run_imports_no_sqlalchemy(work: Work, told: list[str]) -> None:
    record(work, write_document(work, 1), told.append)
    code = (
        "import sys, json; from optimize.history import record; from optimize.work import Work\n"
        "record(Work(sys.argv[1]), json.load(sys.stdin), print)\n"
        "print('sqlalchemy' in sys.modules)"
    )
    line = [sys.executable, "-c", code, str(work.root)]
    given = json.dumps(document(2))
    done = subprocess.run(line, input=given, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
    assert len(tables(work.history)[TABLES[0]]) == 2


def write_document(work: Work, number: int, **changed: Any) -> dict[str, Any]:
    made = document(number, **changed)
    write(work.runs, made)
    return made


# --- what can befall a database ---------------------------------------------------------------------------------------


@pytest.fixture
def filled(work: Work, told: list[str]) -> Work:
    """Three runs, in folders and in the database."""
    for number in range(3):
        record(work, write_document(work, number), told.append)
    assert told == []
    return work


ALL = [run_id(2), run_id(1), run_id(0)]


def test_a_lost_database_is_made_again(filled: Work, told: list[str]) -> None:
    filled.history.unlink()
    assert ids(filled, told.append) == ALL
    assert told == []


@pytest.mark.parametrize("damage", ["no database", "first page", "middle", "cut"])
def test_a_damaged_database_makes_room_for_a_new_one(filled: Work, told: list[str], damage: str) -> None:
    path = filled.history
    found = path.read_bytes()
    spoiled = {
        "no database": b"not a database at all, but some text" * 30,
        "first page": found[:16] + b"\xff" * 3000 + found[3016:],
        "middle": found[:4096] + b"\xa5" * (len(found) - 8192) + found[-4096:],
        "cut": found[: len(found) // 2],
    }[damage]
    path.write_bytes(spoiled)
    record(filled, write_document(filled, 3), told.append)
    assert ids(filled, told.append) == [run_id(3), *ALL]
    assert len([message for message in told if "was damaged" in message]) == 1
    (aside,) = path.parent.glob("history.db.damaged-*")
    assert spoiled[:1000] in aside.read_bytes()[:1000] + spoiled[:0]


def test_a_locked_database_is_told_of_and_made_up_for(
    filled: Work, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr("optimize.history.database.BUSY_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(filled.history, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        record(filled, write_document(filled, 3), told.append)
        (message,) = told
        assert "locked" in message
        assert ids(filled, told.append) == [run_id(3), *ALL], "read from the runs alone"
        assert "read from the runs alone" in told[-1]
    assert not list(filled.root.glob("*.damaged-*"))
    told.clear()
    assert ids(filled, told.append) == [run_id(3), *ALL]
    assert told == []


def test_a_database_that_cant_be_written(filled: Work, told: list[str]) -> None:
    path = filled.history
    with contextlib.closing(sqlite3.connect(path)) as database:  # to root, modes say nothing
        database.execute("CREATE TRIGGER no BEFORE INSERT ON optimize_runs BEGIN SELECT RAISE(ABORT, 'readonly'); END")
    record(filled, write_document(filled, 3), told.append)
    assert "readonly" in told[0]
    assert ids(filled, told.append) == [run_id(3), *ALL]


def test_a_folder_in_its_place(work: Work, told: list[str]) -> None:
    work.history.mkdir(parents=True)
    record(work, write_document(work, 0), told.append)
    (message,) = told
    assert "unable to open database file" in message
    assert ids(work, told.append) == [run_id(0)]


def test_an_older_schema_is_filled_anew_and_loses_no_run(filled: Work, told: list[str]) -> None:
    """Also those whose folders are gone: the documents are in the database."""
    path = filled.history
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE optimize_schema SET version = 0")
        database.execute("DROP TABLE optimize_scores")
        database.execute("ALTER TABLE optimize_gates RENAME COLUMN margin TO distance")
        database.execute("CREATE TABLE somebody_elses (x)")
    for name in ("run.json", "recipe.json"):
        (filled.runs / run_id(1) / name).unlink()
    record(filled, write_document(filled, 3), told.append)
    written = tables(path)
    assert [row[0] for row in written[TABLES[0]]] == [run_id(number) for number in range(4)]
    assert len(written["optimize_scores"]) == 4 * 22
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT version FROM optimize_schema").fetchall() == [(SCHEMA,)]
        assert database.execute("SELECT * FROM somebody_elses").fetchall() == []
    assert told == []


def test_a_newer_schema_is_left_alone(filled: Work, told: list[str]) -> None:
    with contextlib.closing(sqlite3.connect(filled.history)) as database, database:
        database.execute("UPDATE optimize_schema SET version = 99")
    before = filled.history.read_bytes()
    record(filled, write_document(filled, 3), told.append)
    assert "has schema 99" in told[0]
    assert filled.history.read_bytes() == before
    assert ids(filled, told.append)[0] == run_id(3)


def test_a_rebuild_brings_back_what_run_json_says(filled: Work, told: list[str]) -> None:
    before = tables(filled.history)
    with contextlib.closing(sqlite3.connect(filled.history)) as database, database:
        database.execute("UPDATE optimize_scores SET value = 0")
        database.execute("DELETE FROM optimize_gates")
    with open_history(filled, tell=told.append) as found:
        found.renew()
        catch_up(found, filled, everything=True)
    assert tables(filled.history) == before


def test_an_address_that_leads_nowhere(work: Work, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for address, said in {
        "postgresql://ada:s3cr3t@127.0.0.1:9/runs": "onnection",
        "postgresql://ada@127.0.0.1:9/runs?password=s3cr3t": "onnection",
        "nonsense:s3cr3t": "can't be understood",
        "nosuch://ada:s3cr3t@host/runs": "can't be understood",
    }.items():
        told.clear()
        monkeypatch.setenv(history.VARIABLE, address)
        record(work, write_document(work, len(list(work.root.glob("runs/*")))), told.append)
        (message,) = told
        assert said in message
        with pytest.raises(HistoryError) as caught, open_history(work, tell=told.append):
            pass
        assert "s3cr3t" not in message + str(caught.value)


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(work: Work, told: list[str]) -> Iterator[Any]:
    """Six runs: two recipes, two hosts, one that failed, one comparison."""
    other = {**HOST, "libraries": {"torch": "2.14.0"}}
    for told_ in (
        document(0, accuracy=0.80, p50_ms=5.0),
        document(1, accuracy=0.79, p50_ms=5.5),
        document(2, accuracy=0.78, p50_ms=9.0, host=other),
        failed(3),
        document(4, recipe="other", verdict="fail", exit_code=1, promoted=None),
        document(5, accuracy=0.7, compared={"candidate": "x", "baseline": "y"}, promoted=None),
    ):
        write(work.runs, told_)
    with open_history(work, tell=told.append) as found:
        yield found
    assert told == []


def ask(found: Any, **filters: Any) -> list[int]:
    return [int(one["run"][-4:], 16) for one in found.read(lambda session: runs(session, Filters(**filters)))]


def test_filters(many: Any) -> None:
    assert ask(many) == [5, 4, 3, 2, 1, 0]
    assert ask(many, recipe="other") == [4]
    assert ask(many, limit=2) == [5, 4]
    assert ask(many, since=datetime(2026, 11, 1, 0, 4, tzinfo=timezone.utc)) == [5, 4]
    assert ask(many, since=datetime(2026, 11, 1, 1, 4, tzinfo=timezone(timedelta(hours=1)))) == [5, 4]
    assert ask(many, artifact="int8") == ask(many, artifact="quantize.int8") == [5, 4, 2, 1, 0]
    assert ask(many, artifact="nobody") == []
    assert many.read(known)["recipe"] == ["other", "pico"]


def test_what_is_said_of_a_run(many: Any) -> None:
    found = many.read(lambda session: runs(session, Filters()))
    assert [one["kind"] for one in found] == ["compare", *["apply"] * 5]
    assert found[2]["error"] == "no memory"
    assert found[2]["summary"] == "ERROR in stage int8: no memory"
    assert found[-1]["promoted"] == {"alias": "production", "version": 1}
    assert found[-1]["started"] == "2026-11-01T00:00:00+00:00"


def test_times_of_two_hosts_are_two_series_and_quality_is_one(many: Any) -> None:
    def points(metric: str) -> list[tuple[str | None, str | None, list[float]]]:
        filters = Filters(recipe="pico", artifact="int8", limit=4)
        found = many.read(lambda session: trend(session, filters, metric))
        return [(one["host"], one["setting"], [point["value"] for point in one["points"]]) for one in found]

    here, there = fingerprint_of(HOST), fingerprint_of({**HOST, "libraries": {"torch": "2.14.0"}})
    assert here != there
    assert points("latency") == [(here, SETTING, [5.0, 5.5, 5.0]), (there, SETTING, [9.0])]
    assert points("accuracy") == [(None, None, [0.80, 0.79, 0.78, 0.7])]
    (series,) = many.read(lambda session: trend(session, Filters(recipe="other", artifact="int8"), "accuracy"))
    assert series["points"][0]["ci"] == [pytest.approx(0.79), pytest.approx(0.81)]


def test_memory_alone_makes_no_other_host() -> None:
    assert fingerprint_of({**HOST, "memory_bytes": 1}) == fingerprint_of(HOST)


def test_runs_from_elsewhere(work: Work, tmp_path: Path, told: list[str]) -> None:
    elsewhere = Work(tmp_path / "elsewhere")
    for number in range(2):
        write(elsewhere.runs, document(number))
    strange = [{"artifacts": [{}]}, {"seconds": math.nan}, {"recipe": None}, {"exit_code": "0"}]
    for number, changed in enumerate(strange):
        write(elsewhere.runs, {**document(7 + number), **changed})
    work.root.mkdir(parents=True)
    with open_history(work, tell=told.append) as found:
        assert import_runs(found, elsewhere.root) == 2
        assert import_runs(found, elsewhere.runs) == 2
        assert import_runs(found, elsewhere.runs / run_id(0)) == 1
        with pytest.raises(RecipeError, match="no run"):
            import_runs(found, tmp_path)
    assert len(told) == 2 * len(strange)
    assert all("is no run.json of schema 1" in message for message in told)
    assert ids(work, told.append) == [run_id(1), run_id(0)]


def test_a_folder_of_any_name(tmp_path: Path, told: list[str]) -> None:
    work = Work(tmp_path / "a%41 b?c=d#e ä")
    record(work, write_document(work, 0), told.append)
    assert work.history.is_file()
    assert ids(work, told.append) == [run_id(0)]
    assert told == []


def test_asking_an_empty_folder_makes_nothing(work: Work, told: list[str]) -> None:
    assert ids(work, told.append) == []
    assert not work.root.exists()
    assert told == []


def test_hostile_text_is_kept_out_of_no_database(work: Work, told: list[str]) -> None:
    hostile = document(0, recipe="a\0b", error={"message": "\ud800'; DROP TABLE optimize_runs; --", "stage": None})
    work.root.mkdir(parents=True)
    with open_history(work, tell=told.append) as found:
        found.add([hostile])
        (one,) = found.read(lambda session: runs(session, Filters()))
    assert one["recipe"] == "a\N{REPLACEMENT CHARACTER}b"
    assert "DROP TABLE" in one["error"]
    assert quick.add(work.history, rows_of(hostile))


def test_when_a_run_began() -> None:
    assert started("20261120-195251-810040-e553") == datetime(2026, 11, 20, 19, 52, 51, 810040, timezone.utc)
    assert started("mine") is None


def test_bars() -> None:
    assert spark([1, 2, 3, 8]) == "▁▂▃█"
    assert spark([2, 2]) == "▄▄"
    assert spark([]) == ""


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def optimize(work: Work, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str, str]]:
    from optimize import cli

    monkeypatch.setenv("OPTIMIZE_WORK", str(work.root))

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run


def test_the_verb(filled: Work, optimize: Any, tmp_path: Path) -> None:
    code, out, err = optimize("history", "--json")
    assert (code, err) == (0, "")
    assert [one["run"] for one in json.loads(out)["runs"]] == ALL
    code, out, _ = optimize("history", "--limit", "1")
    assert ALL[0] in out
    assert ALL[1] not in out
    code, out, _ = optimize("history", "--metric", "latency", "--artifact", "int8")
    assert (code, out.count("5.000 ms"), "Pico 1, 2 cores" in out, "▄▄▄" in out) == (0, 3, True, True)
    code, out, _ = optimize("history", "--since", "1h", "--json")
    assert (code, json.loads(out)["runs"]) == (0, [])
    code, out, err = optimize("history", "--rebuild")
    assert (code, "holds 3 runs" in err) == (0, True)
    write(tmp_path / "more", document(9))
    code, out, err = optimize("history", "--import", str(tmp_path / "more"))
    assert (code, run_id(9) in out, "1 run added" in err) == (0, True, True)
    code, _, err = optimize("history", "--database", f"sqlite:///{tmp_path}/other.db", "--json")
    assert (code, (tmp_path / "other.db").exists()) == (0, True)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["--metric", "acuracy"], 2, "did you mean `accuracy`?"),
        (["--recipe", "pcio"], 2, "did you mean `pico`?"),
        (["--since", "yesterday"], 2, "is no time"),
        (["--import", "nowhere"], 2, "no run.json"),
        (["--database", "postgresql://ada:s3cr3t@127.0.0.1:9/x"], 4, "can't be used"),
    ],
)
def test_mistakes(filled: Work, optimize: Any, line: list[str], code: int, said: str) -> None:
    found, out, err = optimize("history", *line)
    assert (found, out) == (code, "")
    assert said in err
    assert "s3cr3t" not in err


def test_nothing_in_a_run_commands_the_terminal(work: Work, optimize: Any) -> None:
    write(work.runs, failed(0, message="\x1b[31m red \u202e"))
    code, out, _ = optimize("history")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    code, out, _ = optimize("history", "--json")
    assert out.isascii()


def test_the_users_variable_is_heard(work: Work, tmp_path: Path, told: list[str], monkeypatch: Any) -> None:
    monkeypatch.setenv(history.VARIABLE, f"sqlite:///{tmp_path}/shared.db")
    record(work, write_document(work, 0), told.append)
    assert not work.history.exists()
    assert len(tables(tmp_path / "shared.db")[TABLES[0]]) == 1
    assert os.environ[history.VARIABLE]
    assert told == []
