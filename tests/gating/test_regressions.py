"""Planted regressions, a few times each; `benchmarks/regressions.py` has them fifty times, and those that take time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from optimize.evaluate.gates import judge
from optimize.evaluate.statistics import tango_interval
from optimize.evaluate.types import CONFIDENCE, Comparison
from optimize.recipe import Gate


@pytest.mark.parametrize("name", ["flips", "bytes"])
def test_what_is_planted_is_caught(name: str, planting: ModuleType, tmp_path: Path) -> None:
    found = planting.measure(name, 2, planting.Project(tmp_path))
    assert (found["caught"], found["fail"]) == (2, 2)


class Flips:
    """As many rows lost as the draw has it, of 8,000."""

    measurement: dict[str, object] = {}
    metrics = {"accuracy": SimpleNamespace(higher_is_better=True)}

    def __init__(self, lost: int) -> None:
        self.lost = lost

    def compare(self, candidate: str, over: str, metric: str, confidence: float) -> list[Comparison]:
        ci = tango_interval(0, self.lost, 8000, confidence)
        return [Comparison(candidate, over, metric, None, -self.lost / 8000, "difference", ci, 8000, confidence)]

    def absolute(self, name: str, metric: str, confidence: float) -> list[Comparison]:
        raise AssertionError


def test_a_drop_of_the_limit_itself_seldom_passes(planted: ModuleType) -> None:
    """The very draws of the benchmark, 1,000 of them: 5 % pass, and the binomial 99.9 % bound is 72."""
    assert CONFIDENCE == 0.9
    gate = Gate(metric="accuracy", max_drop=0.01, over="production")
    verdicts: Counter[str] = Counter()
    for seed in range(1000):
        lost = len(planted.flips(8000, 0.01, seed, exact=False)["lost"])
        (result,) = judge([gate], Flips(lost), leaves=["candidate"], baseline="plain")
        verdicts[result.verdict] += 1
    assert verdicts["pass"] <= 72
    assert 20 <= verdicts["fail"] <= 90  # as seldom on the other side, and not never


def test_planted_flips_are_what_they_say(planted: ModuleType) -> None:
    for seed in range(5):
        lost = planted.flips(8000, 0.02, seed, exact=True)["lost"]
        assert len(set(lost)) == 160
        assert all(word % planted.WRONG for word in lost)
    counts = [len(planted.flips(8000, 0.01, seed, exact=False)["lost"]) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(80, abs=2)
