"""Kill `apply` at random moments: the store verifies, and a plain re-run finishes with the same digests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.work import Work

KILLS = 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_kills_leave_a_store_that_verifies(pico_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    pico_recipe["evaluate"] = {"latency": None, "peak_memory": False}
    recipe.write_text(json.dumps(pico_recipe))
    began = time.monotonic()
    whole = optimize.apply(recipe, work=tmp_path / "undisturbed")
    expected = [artifact["digest"] for artifact in whole.document["artifacts"]]
    rng = random.Random(0)
    work = Work(tmp_path / "killed")
    command = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(work.root)]
    # The start of Python and torch is the same every time; kills are spread over what comes after it as well.
    longest = max(4.0, time.monotonic() - began + 3.0)
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=rng.uniform(0.05, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        assert work.store.verify_all() == []
        if killed and process.returncode == 0 and rng.random() < 0.8:
            # Everything is built: begin again, so that later kills hit real work too.
            for key in (work.root / "store" / "keys").glob("*"):
                key.unlink()
    assert killed >= KILLS // 3
    run = optimize.apply(recipe, work=work)
    assert [artifact["digest"] for artifact in run.document["artifacts"]] == expected
    assert work.store.verify_all() == []
