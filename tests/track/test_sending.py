"""Sending: in a process of its own, within a limit, and without a trace where it fails."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from written_runs import document, run_id, write

from optimize.errors import TrackingError
from optimize.progress import Progress
from optimize.track import TRACKERS, Target, send_all, tensorboard
from optimize.track.content import Content
from optimize.track.sending import send
from optimize.work import Work


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a module in the place of MLflow in the process that sends, with `MlflowClient(...)` doing what is said."""

    def make(does: str) -> Target:
        (tmp_path / "mlflow").mkdir()
        (tmp_path / "mlflow" / "entities.py").write_text("Metric = Param = RunTag = None\n")
        body = f"import os, sys, time\ndef MlflowClient(tracking_uri=None):\n{textwrap.indent(does, '    ')}\n"
        (tmp_path / "mlflow" / "__init__.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
        return Target("mlflow", TRACKERS["mlflow"].load().Config(timeout_seconds=280))

    return make


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("sys.exit('that was all')", "SystemExit: that was all"),
        ("print('last words', file=sys.stderr, flush=True); os._exit(3)", "its process ended with 3: last words"),
        ("os.kill(os.getpid(), 9)", "its process ended with -9"),
        ("raise OSError('x' * 9000)", "xxx ..."),
    ],
)
def test_whatever_a_library_does_is_one_line(work: Work, library: Any, capfd: Any, does: str, said: str) -> None:
    target = library(does)
    with pytest.raises(TrackingError) as caught:
        send(write(work.runs, document(1)), target)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_hangs_is_ended_with_all_that_it_started(work: Work, library: Any, tmp_path: Path) -> None:
    library(
        f"import subprocess\nchild = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(900)'])\n"
        f"print(child.pid, file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True)\ntime.sleep(900)"
    )
    target = Target("mlflow", TRACKERS["mlflow"].load().Config(timeout_seconds=8))
    with pytest.raises(TrackingError, match=r"within 8 s, and was given up"):
        send(write(work.runs, document(1)), target)
    if (tmp_path / "pid").exists():  # on a machine that is too busy it did not come so far
        pid = int((tmp_path / "pid").read_text())
        for _ in range(600):  # the signal takes a while to arrive where many wait for a processor
            if _is_gone(pid):
                break
            time.sleep(0.1)
        assert _is_gone(pid)


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_no_secret_of_the_environment_is_told(work: Work, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cr3t")
    target = library("raise ValueError('refused: ' + os.environ['MLFLOW_TRACKING_PASSWORD'])")
    with pytest.raises(TrackingError, match=r"refused: \*\*\*"):
        send(write(work.runs, document(1)), target)


class Heard(Progress):
    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []

    def start(self, name: str, text: str = "") -> None:
        self.said.append(("start", name))

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        self.said.append(("finish", name, text))

    def fail(self, name: str, text: str = "") -> None:
        self.said.append(("fail", name))

    def warn(self, name: str, message: str) -> None:
        self.said.append(("warn", name, message))


def test_one_that_fails_keeps_no_other_from_its_run(work: Work, library: Any) -> None:
    broken, heard = library("raise ValueError('down')"), Heard()
    send_all(
        [broken, Target("tensorboard", tensorboard.Config(timeout_seconds=280))], write(work.runs, document(1)), heard
    )
    assert [one[:2] for one in heard.said] == [
        ("start", "track mlflow"),
        ("fail", "track mlflow"),
        ("warn", "track mlflow"),
        ("start", "track tensorboard"),
        ("finish", "track tensorboard"),
    ]
    assert heard.said[2][2].endswith(f"down; `optimize track {run_id(1)}` sends it again")
    assert Path(heard.said[-1][2]).is_dir()


def test_what_a_document_says_is_no_markup_and_no_name(work: Work) -> None:
    told = document(1)
    told["artifacts"][1]["name"] = "<b>int8</b>\n# x"
    told["gates"][0]["reason"] = "# heading\n<script>"
    content = Content.of(write(work.runs, told, {"stages": [{"name": "a:b=c", "export": "onnx", "empty": None}]}))
    assert all(line.startswith("    ") or not line for line in content.note.splitlines())
    assert not [name for name in (*content.metrics, *content.parameters) if set(name) & set("<>:=,\n#")]
    assert content.parameters == {"stages.a_b_c.name": "a:b=c", "stages.a_b_c.export": "onnx"}
    assert set(content.key_metrics) <= set(content.metrics)


def test_a_folder_without_a_recipe_can_be_sent(work: Work) -> None:
    folder = write(work.runs, document(1))
    (folder / "recipe.json").unlink()
    content = Content.of(folder)
    assert content.parameters == {}
    assert [path.name for path in content.files] == ["run.json"]
