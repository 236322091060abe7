from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optimize.artifact import Artifact
from optimize.evaluate.types import Comparison
from optimize.progress import Progress
from optimize.recipe import Evaluate, Gate
from optimize.scoring import Scoring, Subject
from optimize.work import Work


class Good:
    """An evaluation in which everything is well."""

    def __init__(self, samples: Path) -> None:
        self.sidecars = {"latency": samples}

    measurement = {"rounds": 6, "control": {None: {"ci": [0.0, 0.0]}}}
    metrics = {name: SimpleNamespace(higher_is_better=name == "accuracy") for name in ("accuracy", "latency", "size")}

    def compare(self, candidate: str, over: str, metric: str, confidence: float) -> list[Comparison]:
        unit, value = {"accuracy": ("difference", 0.0), "latency": ("speedup", 2.0), "size": ("ratio", 0.5)}[metric]
        return [Comparison(candidate, over, metric, None, value, unit, (value, value), 6)]  # type: ignore[arg-type]

    def absolute(self, name: str, metric: str, confidence: float) -> list[Comparison]:
        return [Comparison(name, None, metric, None, 1.0, "absolute", (1.0, 1.0), 6)]


@pytest.mark.parametrize("remeasure", [False, True])
def test_the_one_that_is_taken_is_confirmed_on_its_own_gates(
    remeasure: bool, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def evaluate(subjects: Any, **settings: Any) -> Good:
        asked.update(settings, subjects=set(subjects))
        return Good(tmp_path / "samples.json")

    monkeypatch.setattr("optimize.evaluate.evaluate", evaluate)
    recipe: Any = SimpleNamespace(
        baseline="teacher",
        model=SimpleNamespace(task="text-classification"),
        evaluate=Evaluate(),
        gates=[
            Gate(metric="accuracy", max_drop=0.02),
            Gate(metric="latency", min_speedup=1.5, over="onnx"),  # on every leaf but onnx
            Gate(metric="latency", max_ms=5),
            Gate(metric="size", max_ratio=0.5, on="int8"),
            Gate(metric="size", max_ratio=0.6, on=("int8", "onnx")),
        ],
    )
    subjects = {name: Subject(Artifact(tmp_path, "onnx", {}, {}), "x") for name in ("teacher", "onnx", "int8", "other")}
    document: dict[str, Any] = {}
    sidecars: dict[str, Path] = {}
    data: Any = None

    def confirmed(chosen: str) -> list[tuple[str, str, str | None]]:
        scoring = Scoring(recipe, data, work, Progress(), remeasure, document, sidecars)
        results = scoring.confirm(subjects, chosen, leaves=["onnx", "int8", "other"])
        assert {result.verdict for result in results} == {"pass"}
        assert (asked["again"], asked["remeasure"]) == (True, remeasure)
        assert document["confirmation"]["artifact"] == chosen
        assert sidecars == {"latency.confirmation": tmp_path / "samples.json"}
        return [(result.metric, result.artifact, result.over) for result in results]

    assert confirmed("onnx") == [
        ("accuracy", "onnx", "teacher"),
        ("latency", "onnx", None),
        ("size", "onnx", "teacher"),
    ]
    assert asked["subjects"] == {"onnx", "teacher"}
    assert len(confirmed("int8")) == 5
    assert asked["subjects"] == {"int8", "onnx", "teacher"}
