"""Kill `apply` at random moments, or start it twice: the store verifies, and nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from optimize.run import run_documents
from optimize.work import Work

KILLS = 30


SERVER = """
import os, sys
import accelerate, pyarrow.parquet, transformers
from optimize import artifact, cli, data, engine, run, store
from optimize.distill import finetune
from optimize.quantize import cast
from optimize.tasks import text_classification

transformers.BertForSequenceClassification, transformers.PreTrainedTokenizerFast, transformers.Trainer
nowhere = os.open(os.devnull, os.O_RDWR)
for line in sys.stdin:
    process = os.fork()
    if not process:
        os.setsid()
        for stream in range(3):
            os.dup2(nowhere, stream)
        cli.main(line.split("\\t")[:-1])
    print(process, flush=True)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
"""Starts `optimize` for each line of arguments, with what it imports there already, so that kills hit its work."""


class Server:
    def __init__(self, folder: Path) -> None:
        # One thread: a fork has no others.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=folder
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(self, recipe: Path, work: Work, *, kill_after: float | None = None) -> tuple[int, float]:
        """(the exit code of `optimize apply`, its seconds)"""
        line = ["apply", str(recipe), "--work", str(work.root)]
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{word}\t" for word in line).encode() + b"\n")
        self._process.stdin.flush()
        process = self._answer()
        began = time.monotonic()
        killer = threading.Timer(kill_after or 0, _kill, (process,))
        if kill_after is not None:
            killer.start()
        code = self._answer()
        killer.cancel()
        return code, time.monotonic() - began

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_thirty_kills_leave_a_store_that_verifies(pico_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"] = {"latency": None, "peak_memory": False}
    pico_recipe["stages"][0]["epochs"] = 1
    pico_recipe["stages"][1:] = [{"quantize": "cast", "dtype": "bfloat16"}]
    recipe.write_text(json.dumps(pico_recipe))
    rng = random.Random(0)
    work = Work(tmp_path / "killed")
    killed = 0
    with Server(tmp_path) as server:
        undisturbed = Work(tmp_path / "undisturbed")
        code, longest = server.run(recipe, undisturbed)
        assert code == 0
        expected = digests(undisturbed)
        for _ in range(KILLS):
            code, _ = server.run(recipe, work, kill_after=rng.uniform(0.01, longest))
            assert code in (0, -signal.SIGKILL)
            assert work.store.verify_all() == []
            if code == 0:
                assert digests(work) == expected
                # Everything is made: forget it, so that later kills hit work again.
                for path in (work.root / "store" / "keys").iterdir():
                    path.unlink()
            else:
                killed += 1
        assert killed >= KILLS // 2
        assert server.run(recipe, work)[0] == 0
        assert digests(work) == expected
        assert work.store.verify_all() == []


def test_two_runs_at_once_do_the_work_once(pico_recipe: dict[str, Any], tmp_path: Path, work: Work) -> None:
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"] = {"latency": None, "peak_memory": False}
    recipe.write_text(json.dumps(pico_recipe))
    processes = [start(recipe, work) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    one, other = (document["artifacts"] for _, document in run_documents(work))
    assert [artifact["digest"] for artifact in one] == [artifact["digest"] for artifact in other]
    assert [a["cached"] + b["cached"] for a, b in zip(one, other, strict=True)] == [1, 1, 1]
    assert work.store.verify_all() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_nothing_running(
    pico_recipe: dict[str, Any], tmp_path: Path, built_work: Work, how: signal.Signals
) -> None:
    """In the middle of measuring, when processes of ours wait stopped."""
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"]["latency"]["budget_seconds"] = 500
    recipe.write_text(json.dumps(pico_recipe))
    line = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(built_work.root)]
    process = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stderr is not None
    said = []
    for told in process.stderr:
        said.append(told)
        if told.startswith("scores:"):
            time.sleep(4)  # the first round has begun
            process.send_signal(how)
            break
    workers = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    said += process.stderr.readlines()
    assert process.wait(30) == 130
    assert "Traceback" not in "".join(said)
    assert not {pid for pid in workers if psutil.pid_exists(pid)}
    ((_, document),) = run_documents(built_work)
    assert document["error"]["type"] == "KeyboardInterrupt"
    assert [artifact["name"] for artifact in document["artifacts"]] == ["finetune", "onnx", "int8"]
    assert built_work.store.verify_all() == []


def start(recipe: Path, work: Work) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(work.root)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def digests(work: Work) -> list[str]:
    """What the newest run made."""
    return [artifact["digest"] for artifact in next(run_documents(work))[1]["artifacts"]]
