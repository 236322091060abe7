"""Gates: from comparisons to verdicts.

A gate passes where the whole interval lies on the good side of its limit, fails where all of it lies on the bad side,
and is inconclusive otherwise. It holds at every setting that was measured: each gives a result of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from optimize.errors import EvaluationError
from optimize.evaluate.statistics import sample_needed
from optimize.evaluate.types import LEVEL, TIMES, Comparison, GateResult, Interval, Unit, Verdict

if TYPE_CHECKING:
    from optimize.recipe import Gate


class Directed(Protocol):
    @property
    def higher_is_better(self) -> bool: ...


class Evidence(Protocol):
    """What judging reads of an evaluation."""

    @property
    def metrics(self) -> Mapping[str, Directed]: ...
    @property
    def measurement(self) -> Mapping[str, Any]: ...
    def compare(self, candidate: str, over: str, metric: str, confidence: float) -> Sequence[Comparison]: ...
    def absolute(self, name: str, metric: str, confidence: float) -> Sequence[Comparison]: ...


class Rule(NamedTuple):
    unit: Unit
    side: int
    """1: large values are good; -1: small ones."""
    words: str


RULES: dict[str, Rule] = {
    "min": Rule("absolute", 1, "at least {} is asked for"),
    "max": Rule("absolute", -1, "at most {} is allowed"),
    "max_ms": Rule("absolute", -1, "at most {} ms is allowed"),
    "max_drop": Rule("difference", 1, "a drop of at most {} is allowed"),
    "max_increase": Rule("difference", -1, "a rise of at most {} is allowed"),
    "min_ratio": Rule("ratio", 1, "at least {} is asked for"),
    "max_ratio": Rule("ratio", -1, "at most {} is allowed"),
    "min_speedup": Rule("speedup", 1, "at least {} is asked for"),
}
"""Equality is on the good side, which matters to exact measures (size) alone."""

IN_ROUNDS = (*TIMES, "peak_memory")
"""Metrics whose sample is of rounds; that of others is of rows."""


def judge(
    gates: Sequence[Gate],
    evaluation: Evidence,
    *,
    leaves: Sequence[str],
    baseline: str,
    select: str | None = None,
) -> list[GateResult]:
    """Every gate on every artifact it is on, at every setting.

    With `select`, the best of several leaves will be taken, and each gate is held to 5 % / K, so that the one taken is
    wrong in at most 5 %. Raises `EvaluationError` where a measure is missing or is not a number: neither is ever "met".
    """
    confidence = 1 - 2 * LEVEL / (len(leaves) if select else 1)
    results: list[GateResult] = []
    for gate in gates:
        name, _ = gate.limit
        over = None if RULES[name].unit == "absolute" else gate.over or baseline
        named = (gate.on,) if isinstance(gate.on, str) else gate.on
        artifacts = named or [leaf for leaf in leaves if leaf != over]
        if not artifacts or over in artifacts:
            raise EvaluationError(
                f"the gate on {gate.metric} compares {over} with itself",
                hint="name another stage under the gate's `on` or `over`",
            )
        for artifact in artifacts:
            for comparison in _measures(evaluation, gate.metric, artifact, over, confidence):
                results.append(_judge_one(gate, comparison, evaluation))
    return results


def verdict_of(results: Sequence[GateResult]) -> Verdict | None:
    """The worst of the verdicts: fail, inconclusive, pass. None where nothing was asked.

    What is acknowledged does not count.
    """
    verdicts = {"pass" if result.acknowledged else result.verdict for result in results}
    order: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
    return next((verdict for verdict in order if verdict in verdicts), None)


def exit_code_of(results: Sequence[GateResult]) -> int:
    """1 where a gate failed, 3 where one that doesn't merely warn is inconclusive, else 0."""
    if verdict_of(results) == "fail":
        return 1
    open_ = (one for one in results if one.verdict == "inconclusive" and not one.acknowledged)
    return 3 if any(one.on_inconclusive == "fail" for one in open_) else 0


def select_leaf(metric: str, evaluation: Evidence, results: Sequence[GateResult], leaves: Sequence[str]) -> str | None:
    """The passing leaf that is best by `metric` (over several settings: by the sum of logarithms), or None."""
    passing = [leaf for leaf in leaves if verdict_of([one for one in results if one.artifact == leaf]) == "pass"]
    if not passing:
        return None
    sign = 1 if _metric(evaluation, metric).higher_is_better else -1

    def merit(leaf: str) -> float:
        values = [one.estimate for one in _measures(evaluation, metric, leaf, None, 1 - 2 * LEVEL)]
        return sign * (values[0] if len(values) == 1 else sum(map(_log, values)))

    return max(passing, key=merit)


def _metric(evaluation: Evidence, metric: str) -> Directed:
    if metric not in evaluation.metrics:
        raise EvaluationError(
            f"nothing measured {metric}", hint=f"measured were: {', '.join(evaluation.metrics) or 'nothing'}"
        )
    return evaluation.metrics[metric]


def _measures(
    evaluation: Evidence, metric: str, artifact: str, over: str | None, confidence: float
) -> Sequence[Comparison]:
    _metric(evaluation, metric)
    found = (
        evaluation.absolute(artifact, metric, confidence)
        if over is None
        else evaluation.compare(artifact, over, metric, confidence)
    )
    if not found:
        raise EvaluationError(f"{metric} of {artifact}{f' over {over}' if over else ''} was not measured")
    return found


def _judge_one(gate: Gate, comparison: Comparison, evaluation: Evidence) -> GateResult:
    name, limit = gate.limit
    rule = RULES[name]
    higher = _metric(evaluation, gate.metric).higher_is_better
    if rule.unit == "difference" and higher != (name == "max_drop"):
        better = "more" if higher else "less"
        raise EvaluationError(f"{name} is no limit for {gate.metric}, of which {better} is better")
    estimate, ci = _in_unit(comparison, rule.unit, name)
    bound = -limit if name == "max_drop" else limit
    near, far = (ci[0], ci[1]) if rule.side > 0 else (-ci[1], -ci[0])
    verdict: Verdict = "inconclusive"
    if near >= rule.side * bound:
        verdict = "pass"
    elif far < rule.side * bound:
        verdict = "fail"
    doubt = _control_doubt(evaluation, comparison, estimate, bound) if gate.metric in TIMES else None
    if doubt:
        verdict = "inconclusive"
    outcome = {"pass": "met", "fail": "not met"}.get(verdict) or doubt or _what_settles(comparison, estimate, ci, bound)
    return GateResult(
        metric=gate.metric,
        artifact=comparison.artifact,
        over=comparison.over,
        setting=comparison.setting,
        limit={name: limit},
        estimate=estimate,
        ci=ci,
        margin=rule.side * (estimate - bound),
        verdict=verdict,
        reason=f"{_describe(comparison, rule.unit, estimate, ci)}; {rule.words.format(_number(limit))}: {outcome}",
        on_inconclusive=gate.on_inconclusive,
        location=gate.location,
    )


def _in_unit(comparison: Comparison, unit: Unit, limit: str) -> tuple[float, Interval]:
    """The comparison's estimate and interval as the limit wants them."""
    estimate, (low, high) = comparison.estimate, comparison.ci
    if unit == "ratio" and comparison.unit == "speedup":
        estimate, low, high = 1 / estimate, 1 / high, 1 / low if low > 0 else math.inf
    elif unit == "ratio" and comparison.unit == "difference" and "ratio" in comparison.details:
        share = comparison.details["ratio"]
        estimate, (low, high) = share["estimate"], share["ci"]
    elif unit != comparison.unit:
        raise EvaluationError(
            f"{limit} can't judge {comparison.metric}, which is compared as a {comparison.unit}",
            hint=f"a limit for a {comparison.unit}: "
            + ", ".join(name for name, rule in RULES.items() if rule.unit == comparison.unit),
        )
    if any(math.isnan(number) for number in (estimate, low, high)):
        versus = f" over {comparison.over}" if comparison.over else ""
        raise EvaluationError(
            f"{comparison.metric} of {comparison.artifact}{versus} is not a number, so {limit} can't be judged",
            hint="a ratio needs a positive value to be a share of; max_drop does not" if unit == "ratio" else None,
        )
    return estimate, (low, high)


def _control_doubt(evaluation: Evidence, comparison: Comparison, estimate: float, bound: float) -> str | None:
    """Why the gate stays open: the baseline may differ from itself by more than the estimate does from the limit."""
    control = evaluation.measurement.get("control", {}).get(comparison.setting)
    if control is None:
        raise EvaluationError(f"{comparison.metric} at {comparison.setting} was measured without an A/A control")
    far_end = max(math.inf if end is None else abs(end) for end in control["ci"])
    margin = abs(_log(estimate) - _log(bound))
    if margin >= far_end:
        return None
    apart = f"{math.expm1(far_end):.1%}" if far_end < 1 else "an unknown amount"
    return (
        f"can't tell, since the baseline measured against itself came out up to {apart} apart, more than the"
        f" {math.expm1(margin):.1%} between the estimate and the limit; a quieter machine or more rounds would help"
    )


def _what_settles(comparison: Comparison, estimate: float, ci: Interval, bound: float) -> str:
    unit = "rounds" if comparison.metric in IN_ROUNDS else "rows"
    if not all(map(math.isfinite, ci)):
        return f"can't tell, since there are too few {unit} for an interval"
    if unit == "rounds":
        needed = sample_needed(comparison.n, _log(estimate), (_log(ci[0]), _log(ci[1])), _log(bound))
    else:
        needed = sample_needed(comparison.n, estimate, ci, bound)
    if needed is None:
        return f"can't tell, and no number of {unit} will, since the estimate is on the limit"
    return f"can't tell from {comparison.n:,} {unit}; about {max(needed, comparison.n + 1):,} would settle it"


def _describe(comparison: Comparison, unit: Unit, estimate: float, ci: Interval) -> str:
    subject = f"{comparison.metric} of {comparison.artifact}"
    show = _number
    if unit == "difference":
        show = "{:+.4g}".format
        text = f"{subject} is {show(estimate)} from that of {comparison.over}"
    elif unit == "ratio":
        text = f"{subject} is {show(estimate)} of that of {comparison.over}"
    elif unit == "speedup":
        ours, theirs = comparison.artifact, str(comparison.over)
        if comparison.metric != "latency":
            ours, theirs = subject, f"that of {theirs}"
        text = f"{ours} is {show(estimate)} times as fast as {theirs}"
    else:
        text = f"{subject} is {show(estimate)}"
    if comparison.setting:
        text += f" at {comparison.setting}"
    if ci[0] == ci[1]:
        return text
    return f"{text} ({100 * comparison.confidence:.3g} % interval {show(ci[0])} to {show(ci[1])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
