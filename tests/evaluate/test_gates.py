"""Gates: which intervals pass, fail or leave open, and what is never "met"."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.errors import EvaluationError
from optimize.evaluate.answers import compare_hits
from optimize.evaluate.gates import RULES, exit_code_of, judge, select_leaf, verdict_of
from optimize.evaluate.types import Comparison, GateResult
from optimize.recipe import Gate

BATCH_1, BATCH_8 = (f"batch_size={size},sequence_length=128,threads=1" for size in (1, 8))
ROWS = 8_000


@dataclass(frozen=True)
class Direction:
    higher_is_better: bool


@dataclass
class Evaluation:
    """What was measured, written down by hand; it notes the confidence that it was asked for."""

    found: list[Comparison] = field(default_factory=list)
    control: dict[str, Any] = field(
        default_factory=lambda: {key: {"estimate": 0.0, "ci": [-0.01, 0.005]} for key in (BATCH_1, BATCH_8)}
    )
    asked: set[float] = field(default_factory=set)
    metrics = {
        "accuracy": Direction(True),
        "perplexity": Direction(False),
        "latency": Direction(False),
        "size": Direction(False),
    }

    @property
    def measurement(self) -> dict[str, Any]:
        return {"control": self.control}

    def compare(self, candidate: str, over: str, metric: str, confidence: float) -> list[Comparison]:
        self.asked.add(confidence)
        return [one for one in self.found if (one.artifact, one.over, one.metric) == (candidate, over, metric)]

    def absolute(self, name: str, metric: str, confidence: float) -> list[Comparison]:
        return self.compare(name, None, metric, confidence)  # type: ignore[arg-type]


def accuracy(estimate: float, low: float, high: float, artifact: str = "int8", **details: Any) -> Comparison:
    return Comparison(artifact, "teacher", "accuracy", None, estimate, "difference", (low, high), 800, details=details)


def speed(estimate: float, low: float, high: float, setting: str = BATCH_1, over: str = "teacher") -> Comparison:
    return Comparison("int8", over, "latency", setting, estimate, "speedup", (low, high), 6)


def size(ratio: float) -> Comparison:
    return Comparison("int8", "teacher", "size", None, ratio, "ratio", (ratio, ratio), 1)


def alone(
    metric: str, value: float, low: float, high: float, artifact: str = "int8", setting: Any = None
) -> Comparison:
    return Comparison(artifact, None, metric, setting, value, "absolute", (low, high), 10)


def judge_one(gate: Gate, *found: Comparison, **evaluation: Any) -> GateResult:
    results = judge([gate], Evaluation(list(found), **evaluation), leaves=["int8"], baseline="teacher")
    assert len(results) == len(found)
    return results[0]


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "comparison", "verdict", "margin"),
    [
        (Gate(metric="accuracy", max_drop=0.02), accuracy(-0.005, -0.012, 0.002), "pass", 0.015),
        (Gate(metric="accuracy", max_drop=0.02), accuracy(-0.015, -0.022, -0.008), "inconclusive", 0.005),
        (Gate(metric="accuracy", max_drop=0.02), accuracy(-0.04, -0.05, -0.03), "fail", -0.02),
        (Gate(metric="accuracy", max_drop=0.02), accuracy(0.04, 0.03, 0.05), "pass", 0.06),
        (Gate(metric="latency", min_speedup=1.5), speed(2.0, 1.9, 2.1), "pass", 0.5),
        (Gate(metric="latency", min_speedup=1.5), speed(1.5, 1.4, 1.6), "inconclusive", 0.0),
        (Gate(metric="latency", min_speedup=1.5), speed(1.2, 1.1, 1.3), "fail", -0.3),
        (Gate(metric="latency", max_ratio=0.6), speed(2.0, 1.9, 2.1), "pass", 0.1),
        (Gate(metric="latency", max_ratio=0.4), speed(2.0, 1.9, 2.1), "fail", -0.1),
        (Gate(metric="latency", max_ms=6), alone("latency", 5.0, 4.8, 5.2, setting=BATCH_1), "pass", 1.0),
        (Gate(metric="latency", max_ms=5), alone("latency", 5.5, 4.8, 6.2, setting=BATCH_1), "inconclusive", -0.5),
        (Gate(metric="size", max_ratio=0.35), size(0.26), "pass", 0.09),
        (Gate(metric="size", max_ratio=0.35), size(0.35), "pass", 0.0),
        (Gate(metric="size", max_ratio=0.35), size(0.36), "fail", -0.01),
        (Gate(metric="size", max=1000), alone("size", 1000, 1000, 1000), "pass", 0),
        (Gate(metric="accuracy", min=0.8), alone("accuracy", 0.85, 0.81, 0.89), "pass", 0.05),
        (Gate(metric="accuracy", min=0.8), alone("accuracy", 0.75, 0.71, 0.79), "fail", -0.05),
    ],
)
def test_verdicts_and_margins(gate, comparison, verdict, margin):
    result = judge_one(gate, comparison)
    assert result.verdict == verdict, result.reason
    assert result.margin == pytest.approx(margin)
    name, value = gate.limit
    assert result.to_json() == {
        "metric": gate.metric,
        "artifact": "int8",
        "over": comparison.over,
        "setting": comparison.setting,
        "limit": {name: value},
        "estimate": result.estimate,
        "ci": list(result.ci),
        "margin": result.margin,
        "verdict": verdict,
        "reason": result.reason,
        "on_inconclusive": "fail",
        "location": None,
        "acknowledged": None,
    }
    json.dumps(result.to_json(), allow_nan=False)


def test_lower_is_better_differences_and_shares():
    worse = Comparison("int8", "teacher", "perplexity", None, 0.3, "difference", (0.2, 0.4), 100)
    assert judge_one(Gate(metric="perplexity", max_increase=0.5), worse).verdict == "pass"
    assert judge_one(Gate(metric="perplexity", max_increase=0.1), worse).verdict == "fail"
    kept = accuracy(-0.01, -0.02, 0.0, ratio={"estimate": 0.988, "ci": (0.976, 1.0)})
    assert judge_one(Gate(metric="accuracy", min_ratio=0.97), kept).verdict == "pass"
    assert judge_one(Gate(metric="accuracy", min_ratio=0.98), kept).verdict == "inconclusive"
    assert judge_one(Gate(metric="accuracy", min_ratio=0.97), kept).estimate == 0.988


@given(
    st.sampled_from([name for name in RULES if name not in ("max_drop", "max_increase")]),
    st.tuples(*[st.floats(0.1, 10)] * 3).map(sorted),
    st.tuples(*[st.floats(0.1, 10)] * 2).map(sorted),
)
@settings(deadline=None)
def test_a_stricter_limit_never_gives_a_better_verdict(name, numbers, limits):
    low, estimate, high = numbers
    unit = RULES[name].unit
    one = Comparison("int8", None if unit == "absolute" else "teacher", "size", None, estimate, unit, (low, high), 50)
    verdicts = [judge_one(Gate(metric="size", **{name: limit}), one).verdict for limit in limits]
    if RULES[name].side < 0:
        verdicts.reverse()  # a larger limit is the laxer one
    order = ["pass", "inconclusive", "fail"]
    assert order.index(verdicts[0]) <= order.index(verdicts[1])


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    # Among 8,000 rows, with these flips: half a point lost, exactly two points, three and a half.
    [(40, 80, "pass"), (20, 180, "inconclusive"), (20, 300, "fail"), (0, 0, "pass")],
)
def test_planted_flips_are_judged_rightly(gained, lost, verdict):
    over = np.arange(ROWS) % 5 > 0
    candidate = over.copy()
    candidate[np.flatnonzero(over)[:lost]] = False
    candidate[np.flatnonzero(~over)[:gained]] = True
    found = compare_hits(candidate, over, 0.90)
    comparison = Comparison(
        "int8", "teacher", "accuracy", None, found.estimate, "difference", found.ci, found.n, details=found.details
    )
    assert judge_one(Gate(metric="accuracy", max_drop=0.02), comparison).verdict == verdict
    # Two points of a model that is right in 80 % are a share of 0.975: the two say the same.
    assert judge_one(Gate(metric="accuracy", min_ratio=0.975), comparison).verdict == verdict


# --- what it is held over and on --------------------------------------------------------------------------------------


def test_a_gate_holds_at_every_setting():
    fast, slow = speed(2.0, 1.9, 2.1), speed(1.2, 1.1, 1.3, BATCH_8)
    results = judge(
        [Gate(metric="latency", min_speedup=1.5)], Evaluation([fast, slow]), leaves=["int8"], baseline="teacher"
    )
    assert [(one.setting, one.verdict) for one in results] == [(BATCH_1, "pass"), (BATCH_8, "fail")]
    assert verdict_of(results) == "fail"


def test_on_and_over_choose_what_is_compared():
    found = [speed(2.0, 1.9, 2.1), speed(1.2, 1.1, 1.3, over="onnx"), accuracy(0, 0, 0), accuracy(-1, -1, -1, "onnx")]
    gates = [
        Gate(metric="latency", min_speedup=1.5),
        Gate(metric="latency", min_speedup=1.5, over="onnx"),
        Gate(metric="accuracy", max_drop=0.02),
        Gate(metric="accuracy", max_drop=0.02, on="onnx"),
        Gate(metric="accuracy", max_drop=0.02, on=("int8", "onnx")),
    ]
    results = judge(gates, Evaluation(found), leaves=["int8"], baseline="teacher")
    assert [(one.artifact, one.over, one.verdict) for one in results] == [
        ("int8", "teacher", "pass"),
        ("int8", "onnx", "fail"),
        ("int8", "teacher", "pass"),
        ("onnx", "teacher", "fail"),
        ("int8", "teacher", "pass"),
        ("onnx", "teacher", "fail"),
    ]


def test_a_leaf_is_not_compared_with_itself():
    gate = Gate(metric="accuracy", max_drop=0.02)
    evaluation = Evaluation([accuracy(0, 0, 0)])
    assert [one.artifact for one in judge([gate], evaluation, leaves=["int8", "teacher"], baseline="teacher")] == [
        "int8"
    ]
    for gates, leaves in (([gate], ["teacher"]), ([Gate(metric="accuracy", max_drop=0.02, on="teacher")], ["int8"])):
        with pytest.raises(EvaluationError, match="with itself"):
            judge(gates, evaluation, leaves=leaves, baseline="teacher")


def test_the_best_of_several_is_held_to_a_share_of_the_level():
    found = [accuracy(0, 0, 0), accuracy(0, 0, 0, "openvino"), accuracy(0, 0, 0, "torch")]
    gate = Gate(metric="accuracy", max_drop=0.02)
    evaluation = Evaluation(found)
    judge([gate], evaluation, leaves=["int8"], baseline="teacher", select="latency")
    judge([gate], evaluation, leaves=["int8", "openvino"], baseline="teacher")
    assert evaluation.asked == {0.90}
    evaluation.asked.clear()
    judge([gate], evaluation, leaves=["int8", "openvino", "torch"], baseline="teacher", select="latency")
    assert list(evaluation.asked) == pytest.approx([1 - 2 * 0.05 / 3])


def test_selection_takes_the_best_that_passed():
    def one(artifact: str, verdict: Any) -> GateResult:
        return GateResult("accuracy", artifact, "teacher", None, {"max_drop": 0.0}, 0, (0, 0), 0, verdict, "")

    speeds = {"int8": (4.0, 30.0), "openvino": (5.0, 20.0), "torch": (1.0, 1.0)}
    found = [
        alone("latency", value, value, value, name, setting)
        for name, values in speeds.items()
        for value, setting in zip(values, (BATCH_1, BATCH_8), strict=True)
    ]
    found += [alone("accuracy", value, 0, 1, name) for name, value in (("int8", 0.9), ("openvino", 0.8))]
    results = [one("int8", "pass"), one("openvino", "pass"), one("torch", "inconclusive")]
    assert select_leaf("latency", Evaluation(found), results, list(speeds)) == "openvino"
    assert select_leaf("accuracy", Evaluation(found), results, list(speeds)) == "int8"
    assert select_leaf("latency", Evaluation(found), results[2:], list(speeds)) is None


# --- the control and what would settle it -----------------------------------------------------------------------------


def test_a_margin_within_the_controls_far_end_is_inconclusive_either_way():
    noisy = {BATCH_1: {"estimate": 0.03, "ci": [-0.01, 0.07]}}
    for limit, comparison in ((1.0, speed(1.05, 1.01, 1.09)), (1.0, speed(0.95, 0.91, 0.99))):
        gate = Gate(metric="latency", min_speedup=limit)
        assert judge_one(gate, comparison).verdict in ("pass", "fail")
        result = judge_one(gate, comparison, control=noisy)
        assert result.verdict == "inconclusive"
        assert "measured against itself" in result.reason
        assert "7.3%" in result.reason
    assert judge_one(Gate(metric="latency", min_speedup=1.0), speed(1.2, 1.1, 1.3), control=noisy).verdict == "pass"
    unknown = {BATCH_1: {"estimate": None, "ci": [None, None]}}
    assert judge_one(gate, speed(2, 1.9, 2.1), control=unknown).verdict == "inconclusive"


def test_an_open_gate_says_what_would_settle_it():
    result = judge_one(Gate(metric="accuracy", max_drop=0.02), accuracy(-0.015, -0.025, -0.005))
    assert "can't tell from 800 rows; about 3,200 would settle it" in result.reason
    result = judge_one(Gate(metric="latency", min_speedup=1.5), speed(1.6, 1.6 / 1.14, 1.6 * 1.14))
    assert "can't tell from 6 rounds; about 25 would settle it" in result.reason
    result = judge_one(Gate(metric="accuracy", max_drop=0.02), accuracy(-0.02, -0.03, -0.01))
    assert "on the limit" in result.reason
    result = judge_one(Gate(metric="latency", min_speedup=1.5), replace(speed(2.0, 0.0, math.inf), n=1))
    assert (result.verdict, result.to_json()["ci"]) == ("inconclusive", [0.0, None])
    assert "too few rounds" in result.reason


def test_reasons_are_sentences():
    result = judge_one(Gate(metric="latency", min_speedup=1.5), speed(2.0, 1.9, 2.1))
    assert result.reason == (
        "int8 is 2 times as fast as teacher at batch_size=1,sequence_length=128,threads=1"
        " (90 % interval 1.9 to 2.1); at least 1.5 is asked for: met"
    )
    result = judge_one(Gate(metric="accuracy", max_drop=0.02), accuracy(-0.04, -0.05, -0.03))
    assert result.reason == (
        "accuracy of int8 is -0.04 from that of teacher (90 % interval -0.05 to -0.03);"
        " a drop of at most 0.02 is allowed: not met"
    )
    result = judge_one(Gate(metric="size", max_ratio=0.35), size(0.26))
    assert result.reason == "size of int8 is 0.26 of that of teacher; at most 0.35 is allowed: met"


# --- what is never "met" ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "found", "message"),
    [
        (Gate(metric="f1", max_drop=0.02), accuracy(0, 0, 0), "nothing measured f1"),
        (Gate(metric="size", max_ratio=0.5), accuracy(0, 0, 0), "size of int8 over teacher was not measured"),
        (Gate(metric="accuracy", max_drop=0.02), accuracy(math.nan, 0, 0), "not a number"),
        (Gate(metric="accuracy", max_drop=0.02), accuracy(0, math.nan, math.nan), "not a number"),
        (
            Gate(metric="accuracy", min_ratio=0.9),
            accuracy(0, 0, 0, ratio={"estimate": math.nan, "ci": (0, 1)}),
            "not a number",
        ),
        (Gate(metric="accuracy", min_ratio=0.9), accuracy(0, 0, 0), "compared as a difference"),
        (Gate(metric="accuracy", max_increase=0.02), accuracy(0, 0, 0), "more is better"),
    ],
)
def test_a_missing_measure_is_an_error(gate, found, message):
    with pytest.raises(EvaluationError, match=message):
        judge([gate], Evaluation([found]), leaves=["int8"], baseline="teacher")


def test_latency_without_a_control_is_an_error():
    with pytest.raises(EvaluationError, match="without an A/A control"):
        judge_one(Gate(metric="latency", min_speedup=1.0), speed(2.0, 1.9, 2.1), control={})


# --- verdicts of many -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        ([], None, 0),
        (["pass"], "pass", 0),
        (["pass", "inconclusive"], "inconclusive", 3),
        (["pass", "inconclusive:warn"], "inconclusive", 0),
        (["inconclusive:warn", "inconclusive"], "inconclusive", 3),
        (["inconclusive", "fail", "pass"], "fail", 1),
        (["fail:warn"], "fail", 1),
    ],
)
def test_the_worst_verdict_decides_and_a_warning_is_no_pass(verdicts, verdict, code):
    results = []
    for text in verdicts:
        said, _, mode = text.partition(":")
        results.append(
            GateResult("m", "a", "b", None, {"min": 1.0}, 1.0, (1.0, 1.0), 0.0, said, "", mode or "fail")  # type: ignore[arg-type]
        )
    assert verdict_of(results) == verdict
    assert exit_code_of(results) == code
