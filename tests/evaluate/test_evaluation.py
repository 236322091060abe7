from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from optimize.artifact import Artifact
from optimize.errors import EvaluationError
from optimize.evaluate import CONFIDENCE, host, latency, outputs, scores
from optimize.evaluate.gates import judge
from optimize.evaluate.measured import LOCK
from optimize.evaluate.timings import CONTROL, Round, Timings
from optimize.progress import Progress
from optimize.recipe import Gate
from optimize.tasks.text_classification import TextClassification

LABEL = "batch_size=1,sequence_length=8,threads=1"
NO_PROCESSES = {"latency": None, "peak_memory": False}
Measured = Callable[..., Any]
Toy = Callable[..., Artifact]


class Told(Progress):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def start(self, name: str, text: str = "") -> None:
        self.events.append(("start", name))

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        self.events.append(("update", name, done, total, text))

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        self.events.append(("finish", name, cached))

    def fail(self, name: str, text: str = "") -> None:
        self.events.append(("fail", name))


@pytest.mark.usefixtures("runtimes_installed")
def test_the_whole_of_it_and_its_reuse(measured: Measured, toy: Toy, toy_data: Any) -> None:
    base, other, slow = toy("a"), toy("b", seed=1, width=64), toy("c", format="onnx-twice")
    subjects = {"base": base, "other": other, "slow": slow, "again": base}
    told = Told()
    evaluation = measured(subjects, progress=told)

    assert not evaluation.reused
    assert told.events[0] == ("start", "scores")
    assert told.events[-1] == ("finish", "scores", False)
    assert any(event[0] == "update" and "round" in event[-1] for event in told.events)
    assert {name: metric.higher_is_better for name, metric in evaluation.metrics.items()} == {
        "accuracy": True,
        "size": False,
        "latency": False,
        "peak_memory": False,
    }
    scores = evaluation.scores["slow"]
    assert scores["accuracy"]["n"] == 200
    assert scores["accuracy"]["ci"][0] < scores["accuracy"]["value"] < scores["accuracy"]["ci"][1]
    assert scores["peak_memory_bytes"] > 2**20
    assert [one["batch_size"] for one in scores["latency"]] == [1]
    assert scores["latency"][0]["p50_ms"] >= 1
    assert scores["fidelity"]["baseline"]["flips"] == 0
    assert scores["fidelity"]["parent"]["flips"] > 0
    assert evaluation.scores["base"]["fidelity"] == {}
    json.dumps([evaluation.scores, evaluation.measurement], allow_nan=False)

    (slower,) = evaluation.compare("slow", "base", "latency")
    assert (slower.unit, slower.setting, slower.n) == ("speedup", LABEL, evaluation.measurement["rounds"])
    assert slower.ci[0] <= slower.estimate <= slower.ci[1] < 0.8
    (faster,) = evaluation.compare("base", "slow", "latency")
    assert faster.estimate == pytest.approx(1 / slower.estimate)
    (same,) = evaluation.compare("again", "base", "latency")
    assert same.estimate == pytest.approx(1, abs=0.5)
    assert same.ci[0] < same.ci[1]
    (own,) = evaluation.absolute("slow", "latency")
    assert own.estimate == pytest.approx(scores["latency"][0]["p50_ms"], rel=0.3)
    (size,) = evaluation.compare("other", "base", "size")
    assert size.estimate == other.size_bytes / base.size_bytes == size.ci[0] == size.ci[1]
    assert evaluation.measurement["control"].keys() == {LABEL}

    gates = [Gate(metric="latency", min_speedup=1.0), Gate(metric="accuracy", max_drop=0.5)]
    verdicts = {
        (one.metric, one.artifact): one.verdict
        for one in judge(gates, evaluation, leaves=["slow", "again"], baseline="base", select=None)
    }
    assert verdicts["latency", "slow"] == "fail"
    assert verdicts["latency", "again"] != "fail" or abs(same.estimate - 1) > 0.05
    assert verdicts["accuracy", "slow"] == "pass"

    # The same again, under other names, and of fewer artifacts: nothing is measured, no row is read.
    toy_data.reads = 0
    for reuse in ({"base": base, "other": other, "slow": slow, "again": base}, {"first": base, "last": slow}):
        told = Told()
        second = measured(reuse, progress=told)
        assert second.reused
        assert told.events == [("start", "scores"), ("finish", "scores", True)]
    assert second.scores["last"]["latency"] == scores["latency"]
    assert second.compare("last", "first", "latency")[0].ci == slower.ci
    assert toy_data.reads == 0


@pytest.fixture
def rounds_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Rounds are made up instead of measured; told are the slots of each."""
    made: list[tuple[str, ...]] = []

    def one(timings: Timings, plan: Any, deadline: float) -> Round:
        slots = (*timings.slots, CONTROL)
        made.append(slots)
        seconds = {LABEL: {slot: [[1e-3 + 1e-5 * len(made)]] for slot in slots}}
        return Round(seconds, dict.fromkeys(slots, 10**6), {}, [], (0,), True)

    monkeypatch.setattr(latency, "_round", one)
    return made


def test_measuring_again_adds_rounds_and_says_so(
    measured: Measured, toy: Toy, rounds_made: list[tuple[str, ...]]
) -> None:
    base, one, two = toy("a"), toy("b", seed=1), toy("c", seed=2)
    first = measured({"base": base, "one": one, "two": two})
    assert (first.measurement["rounds"], first.measurement["attempts"]) == (6, 1)
    more = measured({"base": base, "two": two}, remeasure=True)
    assert not more.reused
    assert (more.measurement["rounds"], more.measurement["attempts"]) == (12, 2)
    assert len(rounds_made) == 12
    assert more.compare("two", "base", "latency")[0].n == 12
    kept = measured({"base": base, "two": two})
    assert kept.reused
    assert kept.measurement == more.measurement
    # What was measured of all three has not been lost.
    assert measured({"base": base, "one": one, "two": two}).measurement == first.measurement


def test_measuring_more_artifacts_changes_no_verdict_that_stands(
    measured: Measured, toy: Toy, rounds_made: list[tuple[str, ...]]
) -> None:
    pair = {"base": toy("a"), "one": toy("b", seed=1)}
    alone = measured(pair)
    measured({**pair, "two": toy("c", seed=2)})
    measured({**pair, "two": toy("c2", seed=2)}, remeasure=True)
    assert len(rounds_made) == 18
    assert measured(pair).compare("one", "base", "latency") == alone.compare("one", "base", "latency")


def test_who_measures_is_alone_on_the_machine(
    measured: Measured, toy: Toy, rounds_made: list[tuple[str, ...]], tmp_path: Path
) -> None:
    subjects = {"a": toy("a"), "b": toy("b", seed=1)}
    told = [Told(), Told()]
    with ThreadPoolExecutor(2) as pool:
        with FileLock(tmp_path / LOCK):
            both = [pool.submit(measured, subjects, progress=one) for one in told]
            end = time.monotonic() + 60
            while not all(any("another measurement" in event[-1] for event in one.events[1:]) for one in told):
                assert time.monotonic() < end
                time.sleep(0.01)
            assert not rounds_made
        assert both[0].result(60).measurement == both[1].result(60).measurement
    # The second found what it wanted when its turn came.
    assert len(rounds_made) == 6


def test_without_a_lock_it_is_measured_all_the_same(
    measured: Measured, toy: Toy, rounds_made: list[tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / LOCK).mkdir()
    assert measured({"a": toy("a")}).measurement["rounds"] == len(rounds_made) == 6


@pytest.mark.parametrize("change", ["baseline", "rows", "settings", "host", "evaluator", "task"])
def test_what_differs_is_measured_anew(
    change: str,
    measured: Measured,
    toy: Toy,
    toy_data: Any,
    rounds_made: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subjects = {"a": toy("a"), "b": toy("b", seed=1)}
    measured(subjects)
    assert measured(subjects).reused
    changes: dict[str, Any] = {}
    if change == "baseline":
        subjects = dict(reversed(subjects.items()))
    elif change == "rows":
        toy_data.digests["evaluation"] = "sha256:others"
    elif change == "settings":
        latency_settings = {"batch_sizes": (1,), "sequence_length": 8, "rounds": 7, "half_width": 1.0}
        changes["settings"] = {"latency": latency_settings}
    elif change == "host":
        rebooted = {**host.fingerprint(), "memory_bytes": 2**30}
        monkeypatch.setattr(host, "fingerprint", lambda: rebooted)
        assert measured(subjects).reused
        elsewhere = {**rebooted, "cpu": {"model": "another"}}
        monkeypatch.setattr(host, "fingerprint", lambda: elsewhere)
    elif change == "task":
        monkeypatch.setattr(TextClassification, "VERSION", 99)
    else:
        monkeypatch.setattr(scores, "VERSION", 99)
    again = measured(subjects, **changes)
    assert not again.reused
    assert len(rounds_made) == (13 if change == "settings" else 12)


def test_other_confidence_other_interval(measured: Measured, toy: Toy) -> None:
    evaluation = measured({"a": toy("a"), "b": toy("b", seed=1)}, settings=NO_PROCESSES)
    (usual,) = evaluation.compare("b", "a", "accuracy")
    (wider,) = evaluation.compare("b", "a", "accuracy", 0.99)
    assert (usual.confidence, wider.confidence) == (CONFIDENCE, 0.99)
    assert wider.ci[0] < usual.ci[0] < usual.ci[1] < wider.ci[1]
    assert usual.details["flips"].keys() == {"gained", "lost"}
    assert evaluation.absolute("a", "accuracy", 0.99)[0].unit == "absolute"


def test_flips_are_listed_row_by_row(measured: Measured, toy: Toy, toy_data: Any) -> None:
    evaluation = measured({"a": toy("a"), "b": toy("b", seed=1)}, settings=NO_PROCESSES)
    assert set(evaluation.sidecars) == {"flips.b"}
    lines = [json.loads(line) for line in evaluation.sidecars["flips.b"].read_text().splitlines()]
    assert len(lines) == evaluation.scores["b"]["fidelity"]["baseline"]["flips"] > 0
    for line in lines:
        assert line["ids"] == toy_data.table["ids"][line["row"]].as_py()
        assert line["baseline"]["label"] != line["candidate"]["label"]


def test_outputs_are_in_the_order_of_the_rows(measured: Measured, toy: Toy, toy_data: Any) -> None:
    """Batches are sorted by length; a row alone gets the same answer as in a batch."""
    from optimize import runtimes

    artifact = toy("a")
    evaluation = measured({"a": artifact}, settings=NO_PROCESSES)
    session = runtimes.open_artifact(artifact, 1)
    alone = []
    for ids in toy_data.table["ids"].to_pylist():
        padded = np.array([ids + [0] * (7 - len(ids))])
        alone.append(session.run({"input_ids": padded})["logits"][0])
    right = np.mean(np.argmax(alone, axis=1) == toy_data.table["label"].to_numpy())
    assert evaluation.scores["a"]["accuracy"]["value"] == pytest.approx(right, abs=0.1)


def test_what_was_not_measured_is_an_error(measured: Measured, toy: Toy) -> None:
    evaluation = measured({"a": toy("a"), "b": toy("b", seed=1)}, settings=NO_PROCESSES)
    assert set(evaluation.metrics) == {"accuracy", "size"}
    with pytest.raises(EvaluationError, match="latency was not measured"):
        evaluation.compare("b", "a", "latency")


def test_outputs_that_are_no_numbers_are_an_error_that_names_the_artifact(
    measured: Measured, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"logits": np.full((len(inputs["input_ids"]), 2), np.nan, dtype=np.float32)}

    monkeypatch.setattr(outputs.runtimes, "open_artifact", lambda artifact, threads: Broken())
    told = Told()
    with pytest.raises(EvaluationError, match="200 of 200 evaluation rows") as raised:
        measured({"a": toy("a")}, settings=NO_PROCESSES, progress=told)
    assert raised.value.stage == "a"
    assert told.events[-1] == ("fail", "scores")


def test_a_metric_of_the_users_own(
    measured: Measured, toy: Toy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "own_metrics.py"
    module.write_text(
        "def third(outputs, targets):\n    return float((targets == 0).mean())\nthird.higher_is_better = False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {**NO_PROCESSES, "metrics": ("own_metrics:third",)}
    evaluation = measured({"a": toy("a")}, settings=settings)
    assert not evaluation.metrics["own_metrics:third"].higher_is_better
    assert 0 < evaluation.scores["a"]["own_metrics:third"]["value"] < 1
    assert measured({"a": toy("a2")}, settings=settings).reused
    # A function that was changed is not the one that was measured.
    module.write_text(module.read_text() + "# changed\n")
    assert not measured({"a": toy("a3")}, settings=settings).reused
