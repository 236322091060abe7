"""Lines that let a known regression pass: what they cover, how far, until when, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optimize.errors import RecipeError
from optimize.evaluate.gates import exit_code_of, judge, verdict_of
from optimize.evaluate.types import Comparison, GateResult
from optimize.gating import acknowledged
from optimize.gating.acknowledged import Acknowledgements
from optimize.recipe import Gate


class Evidence:
    """Accuracy is two points down, within a tenth of a point; latency is what it was, as far as that can be told."""

    measurement = {"control": {"batch_size=1": {"ci": [0.0, 0.0]}, "batch_size=8": {"ci": [0.0, 0.0]}}}
    metrics = {name: SimpleNamespace(higher_is_better=name == "accuracy") for name in ("accuracy", "latency")}

    def compare(self, candidate: str, over: str, metric: str, confidence: float) -> list[Comparison]:
        if metric == "accuracy":
            return [Comparison(candidate, over, metric, None, -0.02, "difference", (-0.021, -0.019), 8000)]
        return [
            Comparison(candidate, over, metric, f"batch_size={size}", speed, "speedup", (speed - 0.01, speed + 0.01), 9)
            for size, speed in ((1, 0.94), (8, 0.8))
        ]

    def absolute(self, name: str, metric: str, confidence: float) -> list[Comparison]:
        raise AssertionError


GATES = [
    Gate(metric="accuracy", max_drop=0.01, over="production"),
    Gate(metric="latency", min_speedup=0.95, over="production"),
]
RECIPE: Any = SimpleNamespace(stages=[SimpleNamespace(name="int8"), SimpleNamespace(name="onnx")], file=None)


def judging(gates: Sequence[Gate]) -> list[GateResult]:
    return judge(gates, Evidence(), leaves=["int8"], baseline="onnx")


def lines(tmp_path: Path, *blocks: str) -> Acknowledgements:
    path = tmp_path / "acknowledged.yaml"
    body = "".join(f"  - {{{block}}}\n" for block in blocks)
    path.write_text(f"version: 1\nacknowledged:\n{body}" if blocks else "version: 1\nacknowledged: []\n")
    return acknowledged.read(RECIPE, GATES, ["production"], path)


def states(found: Acknowledgements) -> list[str]:
    return [one["state"] for one in found.states()]


LATER = "reason: known, expires: 2999-01-01"


def test_without_a_line_everything_counts(tmp_path: Path) -> None:
    results = lines(tmp_path).apply(judging, judging(GATES))
    assert [one.verdict for one in results] == ["fail", "inconclusive", "fail"]
    assert (verdict_of(results), exit_code_of(results)) == ("fail", 1)
    assert lines(tmp_path).waiver() is None


def test_a_line_lets_its_gate_pass_and_no_other(tmp_path: Path) -> None:
    found = lines(tmp_path, f"metric: accuracy, on: int8, {LATER}")
    accuracy, slightly, much = found.apply(judging, judging(GATES))
    assert accuracy.verdict == "fail"
    location = f"{tmp_path / 'acknowledged.yaml'}:3:5"
    assert accuracy.acknowledged == {"reason": "known", "expires": "2999-01-01", "location": location}
    assert accuracy.to_json()["acknowledged"] == accuracy.acknowledged
    assert (slightly.acknowledged, much.acknowledged) == (None, None)
    assert exit_code_of([accuracy]) == 0
    assert verdict_of([accuracy]) == "pass"
    assert exit_code_of([accuracy, much]) == 1
    assert states(found) == ["used"]


def test_it_goes_no_further_than_it_says(tmp_path: Path) -> None:
    for up_to, state in (("0.03", "used"), ("0.0205", "exceeded"), ("0.015", "exceeded")):
        found = lines(tmp_path, f"metric: accuracy, up_to: {up_to}, {LATER}")
        (result,) = found.apply(judging, judging(GATES[:1]))
        assert (result.acknowledged is not None) == (state == "used")
        assert states(found) == [state]
    # Of two settings only one is slower than the line allows.
    found = lines(tmp_path, f"metric: latency, up_to: 0.9, {LATER}")
    slightly, much = found.apply(judging, judging(GATES[1:]))
    assert (slightly.verdict, slightly.acknowledged) == ("inconclusive", None)
    assert much.acknowledged is None
    assert exit_code_of([slightly, much]) == 1


def test_what_could_not_be_decided_is_hidden_only_where_it_is_said(tmp_path: Path) -> None:
    for said, code in (("", 3), ("inconclusive: true, ", 0)):
        found = lines(tmp_path, f"metric: latency, setting: 'batch_size=1', {said}{LATER}")
        (slightly, _) = found.apply(judging, judging(GATES[1:]))
        assert exit_code_of([slightly]) == code


def test_an_expired_line_lets_nothing_pass_and_an_idle_one_is_told(tmp_path: Path) -> None:
    found = lines(
        tmp_path, "metric: accuracy, reason: old, expires: 2020-01-01", f"metric: accuracy, on: onnx, {LATER}"
    )
    (result,) = found.apply(judging, judging(GATES[:1]))
    assert result.acknowledged is None
    assert states(found) == ["expired", "unneeded"]


def test_the_registry_is_told(tmp_path: Path) -> None:
    found = lines(
        tmp_path, f"metric: accuracy, {LATER}", "metric: latency, inconclusive: true, reason: so, expires: 2998-01-01"
    )
    results = found.apply(judging, judging(GATES))
    assert (verdict_of(results), exit_code_of(results)) == ("pass", 0)
    waiver = found.waiver()
    assert waiver is not None
    assert (waiver.reason, waiver.expires) == ("known; so", "2998-01-01")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (f"metric: acuracy, {LATER}", "did you mean `accuracy`"),
        (f"metric: accuracy, on: int9, {LATER}", "did you mean `int8`"),
        (f"metric: accuracy, over: prodction, {LATER}", "did you mean `production`"),
        (f"metric: accuracy, limit: max_dorp, {LATER}", "did you mean `max_drop`"),
        (f"metric: accuracy, limit: min_ratio, {LATER}", "no gate holds accuracy to `min_ratio`"),
        (f"metrics: accuracy, {LATER}", "did you mean `metric`"),
        (f"metric: accuracy, upto: 3, {LATER}", "did you mean `up_to`"),
        (f"metric: accuracy, up_to: 0.01, {LATER}", "lets nothing pass"),
        (f"metric: accuracy, up_to: -0.5, {LATER}", "no value"),
        (f"metric: latency, up_to: 0.99, {LATER}", "lets nothing pass"),
        (f"metric: latency, up_to: 0, {LATER}", "no value"),
        ("metric: accuracy, expires: 2999-01-01", "`reason` is missing"),
        ("metric: accuracy, reason: known", "`expires` is missing"),
        ("metric: accuracy, reason: ' ', expires: 2999-01-01", "a reason says why"),
        ("metric: accuracy, reason: known, expires: soon", "expected a date"),
        ("metric: accuracy, reason: known, expires: 2026-02-30", "day is out of range"),
        ("metric: accuracy, reason: known, expires: 20260230", "expected a string"),
    ],
)
def test_mistakes_are_told_with_their_place(block: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        lines(tmp_path, block)
    assert caught.value.exit_code == 2
    found = caught.value.diagnostics
    assert any(message in f"{one.message} {one.hint}" for one in found)
    assert {(Path(one.file).name, one.line) for one in found} == {("acknowledged.yaml", 3)}


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "acknowledged.yaml"
    wrong = {"[]": "mapping", "version: 2\nacknowledged: []": "one of", "version: 1": "`acknowledged` is missing"}
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            acknowledged.read(RECIPE, GATES, [], path)
    with pytest.raises(RecipeError, match="can't be read"):
        acknowledged.read(RECIPE, GATES, [], tmp_path / "nowhere.yaml")
    assert not acknowledged.read(RECIPE, GATES, []).items
