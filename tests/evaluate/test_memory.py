from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimize.artifact import Artifact
from optimize.evaluate.process import workers
from optimize.evaluate.timings import Batch

MIB = 2**20


def peak(artifact: Artifact, folder: Path) -> int:
    inputs = folder / "inputs.npz"
    np.savez(inputs, input_ids=np.ones((1, 8), dtype=np.int64))
    with workers([("it", artifact)], 1, folder) as (worker,):
        worker.send_open([inputs], [Batch(1, 8, 1)])
        worker.reply()
        worker.ask("run", input=0, calls=1, lead_in=False)
        return int(worker.ask("peak")["bytes"])


def test_a_larger_model_takes_more(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    small, large = toy("small", width=32), toy("large", width=2048, layers=2)
    more = large.size_bytes - small.size_bytes
    assert more > 30 * MIB
    assert peak(large, tmp_path) - peak(small, tmp_path) > 0.8 * more


def test_our_own_memory_does_not_count(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = toy("a")
    before = peak(artifact, tmp_path)
    held = np.ones(400 * MIB // 8)
    assert peak(artifact, tmp_path) < before + 100 * MIB
    assert held.sum() > 0


def test_memory_without_latency(measured, toy: Callable[..., Artifact]) -> None:  # type: ignore[no-untyped-def]
    subjects = {"small": toy("small"), "large": toy("large", width=2048, layers=2)}
    evaluation = measured(subjects, settings={"latency": None})
    assert "latency" not in evaluation.metrics
    assert "latency" not in evaluation.scores["large"]
    assert "control" not in evaluation.measurement
    (ratio,) = evaluation.compare("large", "small", "peak_memory")
    assert ratio.n == 3
    assert ratio.unit == "ratio"
    assert ratio.ci[0] <= ratio.estimate <= ratio.ci[1]
    sizes = [evaluation.scores[name]["peak_memory_bytes"] for name in ("large", "small")]
    assert ratio.estimate == pytest.approx(sizes[0] / sizes[1], rel=0.05)
    assert ratio.estimate > 1.2
    (own,) = evaluation.absolute("small", "peak_memory")
    assert own.estimate == pytest.approx(sizes[1], rel=0.05)
