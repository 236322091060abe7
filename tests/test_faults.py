"""Kill `apply` at random moments: the store verifies, and a plain re-run finishes with the same digests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.run import run_documents
from optimize.work import Work

KILLS = 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_kills_leave_a_store_that_verifies(pico_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"] = {"latency": None, "peak_memory": False}
    recipe.write_text(json.dumps(pico_recipe))
    work = Work(tmp_path / "killed")

    def start(root: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(root)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    undisturbed = Work(tmp_path / "undisturbed")
    began = time.monotonic()
    assert start(undisturbed.root).wait() == 0
    longest = time.monotonic() - began

    rng = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start(work.root)
        try:
            process.wait(timeout=rng.uniform(0.05, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        assert work.store.verify_all() == []
        if process.returncode == 0:
            # Everything is made: forget it, so that later kills hit work again.
            for path in (work.root / "store" / "keys").iterdir():
                path.unlink()
    assert killed >= KILLS // 2
    run = optimize.apply(recipe, work=work)
    assert _digests(run.document) == _digests(next(document for _, document in run_documents(undisturbed)))
    assert work.store.verify_all() == []


def _digests(document: Mapping[str, Any]) -> list[str]:
    return [artifact["digest"] for artifact in document["artifacts"]]
