"""`optimize push` and `pull` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from promoting import NAME, promote

from optimize import cli
from optimize.work import Work


@pytest.fixture(autouse=True)
def own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--work` sets the variable for child processes: it is put back in the end."""
    monkeypatch.setenv("OPTIMIZE_WORK", "")


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    told = capfd.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_push_and_pull(tmp_path: Path, new_work: Callable[[str], Work], capfd: pytest.CaptureFixture[str]) -> None:
    here, there, remote = new_work("here"), new_work("there"), str(tmp_path / "remote")
    first = promote(here, 1)
    promote(here, 2)
    code, out, _ = run(capfd, "push", "--remote", remote, "--work", str(here.root))
    assert (code, "2 artifacts are there (4 files" in out, "2 new entries" in out) == (0, True, True)
    code, out, _ = run(capfd, "pull", f"{NAME}@1", "--remote", remote, "--work", str(there.root), "--json")
    told = json.loads(out)
    assert (code, told["digests"], told["remote"]) == (0, [first], remote)
    code, _, err = run(capfd, "registry", "verify", "--work", str(there.root))
    assert (code, "1 promoted artifacts are not here" in err) == (0, True)
    promote(there, 3)
    promote(here, 4)
    assert run(capfd, "push", "--remote", remote, "--work", str(there.root))[0] == 0
    code, out, err = run(capfd, "push", "--remote", remote, "--work", str(here.root))
    assert (code, out) == (1, "")
    assert "went another way from entry 3 on" in err
    assert run(capfd, "pull", "--take-theirs", "--remote", remote, "--work", str(here.root))[0] == 0


def test_what_goes_wrong(
    tmp_path: Path, new_work: Callable[[str], Work], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPTIMIZE_REMOTE", raising=False)
    work = new_work("here")
    code, _, err = run(capfd, "push", "--work", str(work.root))
    assert (code, "no remote is named" in err) == (2, True)
    code, out, _ = run(capfd, "pull", "--remote", str(tmp_path / "nowhere"), "--work", str(work.root), "--json")
    assert (code, json.loads(out)["error"]["type"]) == (4, "RemoteError")
