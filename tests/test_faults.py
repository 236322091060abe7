"""Kill `apply` at random moments, or start it twice: the store verifies, and nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from optimize.run import run_documents
from optimize.work import Work

KILLS = 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_kills_leave_a_store_that_verifies(pico_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"] = {"latency": None, "peak_memory": False}
    # Stages that import little: a kill is to hit work of ours.
    pico_recipe["stages"][0]["epochs"] = 1
    pico_recipe["stages"][1:] = [{"quantize": "cast", "dtype": "bfloat16"}]
    recipe.write_text(json.dumps(pico_recipe))

    undisturbed = Work(tmp_path / "undisturbed")
    began = time.monotonic()
    assert start(recipe, undisturbed).wait() == 0
    longest = time.monotonic() - began
    expected = digests(undisturbed)

    def disturb(seed: int) -> int:
        """Half of the kills, in a work folder of their own; how many hit a process at work."""
        rng = random.Random(seed)
        work = Work(tmp_path / f"killed-{seed}")
        killed = 0
        for _ in range(KILLS // 2):
            process = start(recipe, work)
            try:
                process.wait(timeout=rng.uniform(0.05, longest))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            assert work.store.verify_all() == []
            if process.returncode == 0:
                assert digests(work) == expected
                # Everything is made: forget it, so that later kills hit work again.
                for path in (work.root / "store" / "keys").iterdir():
                    path.unlink()
        assert start(recipe, work).wait() == 0
        assert digests(work) == expected
        assert work.store.verify_all() == []
        return killed

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(disturb, range(2))) >= KILLS // 2


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
    pico_recipe: dict[str, Any], tmp_path: Path, work: Work, how: signal.Signals
) -> None:
    """In the middle of measuring, when processes of ours wait stopped."""
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"]["latency"]["budget_seconds"] = 500
    pico_recipe["stages"][0]["epochs"] = 1
    recipe.write_text(json.dumps(pico_recipe))
    line = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(work.root)]
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
    ((_, document),) = run_documents(work)
    assert document["error"]["type"] == "KeyboardInterrupt"
    assert [artifact["name"] for artifact in document["artifacts"]] == ["finetune", "onnx", "int8"]
    assert work.store.verify_all() == []


def start(recipe: Path, work: Work) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(work.root)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def digests(work: Work) -> list[str]:
    """What the newest run made."""
    return [artifact["digest"] for artifact in next(run_documents(work))[1]["artifacts"]]
