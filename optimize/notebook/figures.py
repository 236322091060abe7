"""What the pictures of a run say, as numbers: `static.py` and `interactive.py` draw it, each in its own way.

Everything comes from `run.json`; the table of layers from an artifact's manifest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimize.errors import OptimizeError
from optimize.evaluate.types import TIMES
from optimize.run import verdict_on

Interval = tuple[float, float]
_LESS_IS_BETTER = ("perplexity", "pseudo_perplexity")


@dataclass(frozen=True)
class Point:
    """An artifact in the Pareto picture."""

    name: str
    ms: float
    ms_ci: Interval
    quality: float
    quality_ci: Interval
    size_bytes: int
    verdict: str | None
    baseline: bool
    dominated_by: str | None = None
    """An artifact of which the intervals show that it is at least as good, as fast and as small, and more in one."""


@dataclass(frozen=True)
class Pareto:
    """Quality over time. Intervals are of the comparison with the baseline (paired), laid around its own value."""

    metric: str
    setting: str
    points: list[Point]
    quality_limits: dict[str, float] = field(default_factory=dict)
    """Words of a gate -> the value at which it lies."""
    ms_limits: dict[str, float] = field(default_factory=dict)
    less_is_better: bool = False


@dataclass(frozen=True)
class Line:
    """A comparison in the picture of intervals."""

    artifact: str
    over: str
    estimate: float
    ci: Interval
    limit: float | None = None
    limit_words: str = ""
    verdict: str | None = None


@dataclass(frozen=True)
class Panel:
    """The comparisons of one metric at one setting."""

    title: str
    unit: str
    no_change: float
    lines: list[Line]


@dataclass(frozen=True)
class Step:
    """What a stage changed: from the value before to the value after."""

    name: str
    before: float | None
    after: float | None
    ci: Interval | None
    """Of the value after, against the baseline; None for the baseline itself and what is exact."""


@dataclass(frozen=True)
class Waterfall:
    """The chain of stages that led to an artifact, for each measure."""

    artifact: str
    measures: dict[str, list[Step]]


@dataclass(frozen=True)
class Layers:
    """A number, and perhaps one to hold it against, for each layer."""

    title: str
    measure: str
    names: list[str]
    values: list[float]
    reference: list[float] | None = None
    reference_name: str = ""
    kept: frozenset[str] = frozenset()
    """Layers that were left in float."""


# --- quality over time ------------------------------------------------------------------------------------------------


def pareto(document: Mapping[str, Any], metric: str | None = None, setting: str | None = None) -> Pareto:
    """Raises `OptimizeError` where the run holds no quality or no time."""
    metric = metric or next(iter(qualities(document)), None)
    times = settings(document)
    setting = setting or next(iter(times), None)
    if metric not in qualities(document) or setting not in times:
        raise OptimizeError(
            f"this run has no {metric or 'quality'} at {setting or 'any time'} to draw",
            hint=f"metrics: {', '.join(qualities(document)) or 'none'}; settings: {'; '.join(times) or 'none'}",
        )
    phase = times[setting]
    baseline = _baseline(document)
    points = []
    for one in document["artifacts"]:
        score, ms = one["scores"].get(metric), _ms(one, setting)
        if not score or score["value"] is None or ms is None:
            continue
        better = _against(document, one["name"], baseline, metric, None)
        faster = _against(document, one["name"], baseline, phase, setting)
        points.append(
            Point(
                one["name"],
                ms,
                _time_interval(ms, faster, _control(document, setting) if one["name"] == baseline else None),
                score["value"],
                _quality_interval(score["value"], better),
                one["size_bytes"],
                verdict_on(document, one["name"]),
                one["name"] == baseline,
            )
        )
    less = less_is_better(document, metric)
    quality_limits, ms_limits = _limits(document, metric, phase, setting, {point.name: point for point in points})
    return Pareto(metric, setting, _with_dominated(points, less), quality_limits, ms_limits, less)


def _with_dominated(points: Sequence[Point], less_is_better: bool) -> list[Point]:
    sign = -1 if less_is_better else 1

    def beats(one: Point, other: Point) -> bool:
        low, high = sorted(sign * end for end in one.quality_ci)[0], sorted(sign * end for end in other.quality_ci)[1]
        quality = low - high
        time = other.ms_ci[0] - one.ms_ci[1]
        size = other.size_bytes - one.size_bytes
        return quality >= 0 and time >= 0 and size >= 0 and (quality > 0 or time > 0 or size > 0)

    return [
        Point(**{**vars(one), "dominated_by": next((o.name for o in points if o is not one and beats(o, one)), None)})
        for one in points
    ]


def _quality_interval(value: float, compared: Mapping[str, Any] | None) -> Interval:
    if compared is None:
        return value, value
    low, high = _ends(compared)
    return value + low - compared["estimate"], value + high - compared["estimate"]


def _time_interval(ms: float, compared: Mapping[str, Any] | None, control: Mapping[str, Any] | None) -> Interval:
    if compared is not None:  # a speedup: the faster, the fewer milliseconds
        low, high = _ends(compared)
        return ms * compared["estimate"] / high, ms * compared["estimate"] / max(low, 1e-9)
    if control is not None:  # the baseline against itself, as log ratios
        low, high = _ends(control)
        return ms * math.exp(min(low, 0.0)), ms * math.exp(max(high, 0.0))
    return ms, ms


def _limits(
    document: Mapping[str, Any], metric: str, phase: str, setting: str, points: Mapping[str, Point]
) -> tuple[dict[str, float], dict[str, float]]:
    quality: dict[str, float] = {}
    ms: dict[str, float] = {}
    for gate in document["gates"]:
        ((limit, value),) = gate["limit"].items()
        over = points.get(gate["over"] or "")
        words = f"{limit} {value:g}" + (f" over {gate['over']}" if gate["over"] else "")
        if gate["metric"] == metric:
            places = {"min": value, "max": value}
            if over is not None:
                places |= {"max_drop": over.quality - value, "max_increase": over.quality + value}
                places |= {"min_ratio": over.quality * value, "max_ratio": over.quality * value}
            quality |= {words: places[limit]} if limit in places else {}
        elif gate["metric"] == phase and gate["setting"] == setting:
            if limit == "max_ms":
                ms[words] = value
            elif limit == "min_speedup" and over is not None:
                ms[words] = over.ms / value
    return quality, ms


# --- comparisons with their intervals ---------------------------------------------------------------------------------


def intervals(document: Mapping[str, Any], metric: str | None = None) -> list[Panel]:
    """A panel for every metric and setting that something was compared in. Raises `OptimizeError` for none."""
    panels: dict[tuple[str, str | None], Panel] = {}
    for compared in document["comparisons"]:
        a_point = compared["metric"] == "size" and metric is None
        if (metric and compared["metric"] != metric) or compared["estimate"] is None or a_point:
            continue
        key = compared["metric"], compared["setting"]
        gate = next((g for g in document["gates"] if _same(g, compared)), None)
        one = _as_judged(document, compared, gate)
        unit = one["unit"]
        title = f"{one['metric']}" + (f", {short_setting(one['setting'])}" if one["setting"] else "")
        panel = panels.setdefault(key, Panel(title, unit, 0.0 if unit == "difference" else 1.0, []))
        limit, words = _limit_of(gate, one) if gate else (None, "")
        panel.lines.append(
            Line(
                *(one["artifact"], one["over"], one["estimate"], _ends(one)),
                *(limit, words, gate["verdict"] if gate else None),
            )
        )
    if not panels:
        raise OptimizeError("this run compares nothing with an interval" + (f" of {metric}" if metric else ""))
    return list(panels.values())


def _as_judged(
    document: Mapping[str, Any], one: Mapping[str, Any], gate: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """A difference as a ratio, where a gate or the metric (perplexity) is about that."""
    ratio = (one.get("details") or {}).get("ratio")
    asked = gate is not None and next(iter(gate["limit"])).endswith("_ratio")
    if one["unit"] != "difference" or not ratio or ratio["estimate"] is None:
        return one
    return {**one, **ratio, "unit": "ratio"} if asked or less_is_better(document, one["metric"]) else one


def _same(gate: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    return all(gate[key] == one[key] for key in ("artifact", "over", "metric", "setting"))


def _limit_of(gate: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[float | None, str]:
    """Where a gate's limit lies on the axis of a comparison; None where it is of another kind."""
    ((limit, value),) = gate["limit"].items()
    words = f"{limit} {value:g}"
    places = {"max_drop": -value, "max_increase": value} if one["unit"] == "difference" else {}
    if one["unit"] in ("ratio", "speedup"):
        places |= {"max_ratio": value, "min_ratio": value, "min_speedup": value}
    return places.get(limit), words


# --- the chain of stages ----------------------------------------------------------------------------------------------


def waterfall(document: Mapping[str, Any], artifact: str | None = None) -> Waterfall:
    """What each stage on the way to an artifact cost; the default is the selected one, else the last."""
    by_digest = {one["digest"]: one for one in reversed(document["artifacts"])}
    by_name = {one["name"]: one for one in document["artifacts"]}
    chosen = by_name.get(artifact) if artifact else by_digest.get(document["selected"]) or document["artifacts"][-1]
    if chosen is None:
        raise OptimizeError(f"this run has no artifact {artifact!r}", hint=", ".join(by_name))
    chain, baseline = [chosen], _baseline(document)
    while (parent := by_digest.get(chain[0]["parent"])) is not None and parent not in chain:
        chain.insert(0, parent)
    measures: dict[str, list[Step]] = {}
    for metric in qualities(document):
        measures[metric] = _steps(
            chain,
            lambda one, metric=metric: (one["scores"].get(metric) or {}).get("value"),
            lambda one, value, metric=metric: _quality_interval(
                value, _against(document, one["name"], baseline, metric, None)
            ),
        )
    for setting, phase in settings(document).items():
        measures[f"{phase}, {short_setting(setting)} (ms)"] = _steps(
            chain,
            lambda one, setting=setting: _ms(one, setting),
            lambda one, value, setting=setting, phase=phase: _time_interval(
                value, _against(document, one["name"], baseline, phase, setting), None
            ),
        )
    measures["size (MB)"] = _steps(chain, lambda one: one["size_bytes"] / 1e6, lambda one, value: (value, value))
    return Waterfall(chosen["name"], measures)


def _steps(chain: Sequence[Mapping[str, Any]], value_of: Any, interval_of: Any) -> list[Step]:
    steps: list[Step] = []
    for one in chain:
        value = value_of(one)
        ci = interval_of(one, value) if value is not None else None
        before = steps[-1].after if steps else None
        steps.append(Step(one["name"], before, value, ci if ci and ci[0] < ci[1] else None))
    return steps


# --- layers -----------------------------------------------------------------------------------------------------------


def layers(details: Mapping[str, Any], title: str) -> Layers:
    """What a stage left of each layer in the manifest. Raises `OptimizeError` where it left nothing."""
    table = details.get("layers")
    if isinstance(table, list):
        return layers_of(table, title)
    for part, words in (("sensitivity", "distance of the answers"), ("relative_error", "relative error of the weight")):
        found = details.get(part, {}).get("layers")
        if found:
            measure = details[part].get("distance") or words
            kept = frozenset(details.get("kept") or ()) & found.keys()
            return Layers(f"{title}: {part.replace('_', ' ')}", measure, list(found), list(found.values()), kept=kept)
    raise OptimizeError(f"{title} has no table of layers in its manifest", hint="name the artifact of another stage")


def layers_of(rows: Sequence[Mapping[str, Any]], title: str) -> Layers:
    """The table of layers of GPTQ and of pruning: `error`, beside that of rounding to nearest or of magnitude."""
    known = [row for row in rows if row.get("error") is not None]
    names = [row["name"] for row in known]
    for key, words in (("rtn_error", "rounding to nearest"), ("magnitude_error", "magnitude")):
        if known and key in known[0]:
            reference = [row[key] for row in known]
            values = [row["error"] for row in known]
            return Layers(title, "share of the output's energy that changed", names, values, reference, words)
    for key, words in (("relative_error", "relative error of the weight"), ("zeros", "share of weights that are 0")):
        if rows and key in rows[0]:
            return Layers(title, words, [row["name"] for row in rows], [row[key] for row in rows])
    raise OptimizeError(f"{title} has no layer that calibration reached")


def kinds_and_blocks(names: Sequence[str]) -> dict[str, list[tuple[int, int]]] | None:
    """Kind of layer (`self_attn.q_proj`) -> (block, place in `names`), where the names are of a stack of blocks."""
    found: dict[str, list[tuple[int, int]]] = {}
    for place, name in enumerate(names):
        match = re.match(r"^.*?\.(\d+)\.(.+)$", name)
        if match is None:
            return None
        found.setdefault(match[2], []).append((int(match[1]), place))
    return found if len(names) > len(found) else None


# --- reading a run.json -----------------------------------------------------------------------------------------------


def qualities(document: Mapping[str, Any]) -> list[str]:
    """The task's own metrics that were scored."""
    found = [
        metric
        for one in document["artifacts"]
        for metric, score in one["scores"].items()
        if isinstance(score, Mapping) and "value" in score
    ]
    return list(dict.fromkeys(found))


def less_is_better(document: Mapping[str, Any], metric: str) -> bool:
    told = (document.get("metrics") or {}).get(metric) or {}
    return not told.get("higher_is_better", metric not in _LESS_IS_BETTER)


def settings(document: Mapping[str, Any]) -> dict[str, str]:
    """What times were measured at, in the words of a comparison's `setting` -> `latency`, `prefill` or `decode`."""
    found: dict[str, str] = {}
    for one in document["artifacts"]:
        for score in one["scores"].get("latency") or ():
            found[_setting(score)] = score.get("phase", TIMES[0])
    return found


def short_setting(setting: str | None) -> str:
    """`batch 8` of `batch_size=8,sequence_length=128,threads=1`."""
    pairs = dict(pair.split("=", 1) for pair in (setting or "").split(",") if "=" in pair)
    words = {"batch_size": "batch", "prompt_length": "prompt"}
    return ", ".join(f"{words[name]} {value}" for name, value in pairs.items() if name in words)


def _setting(score: Mapping[str, Any]) -> str:
    names = ("batch_size", "sequence_length", "prompt_length", "new_tokens", "threads")
    return ",".join(f"{name}={score[name]}" for name in names if name in score)


def _ms(artifact: Mapping[str, Any], setting: str) -> float | None:
    scores = artifact["scores"].get("latency") or ()
    return next((score["p50_ms"] for score in scores if _setting(score) == setting), None)


def _baseline(document: Mapping[str, Any]) -> str:
    over = {one["over"] for one in document["comparisons"]}
    names = [one["name"] for one in document["artifacts"] if one["digest"] == document["baseline"]]
    return next((name for name in names if name in over), names[0] if names else "")


def _against(
    document: Mapping[str, Any], name: str, over: str, metric: str, setting: str | None
) -> Mapping[str, Any] | None:
    wanted = {"artifact": name, "over": over, "metric": metric, "setting": setting}
    found = (one for one in document["comparisons"] if all(one[key] == value for key, value in wanted.items()))
    one = next(found, None)
    return one if one and one["estimate"] is not None else None


def _control(document: Mapping[str, Any], setting: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (document["measurement"].get("control") or {}).get(setting)
    return found


def _ends(one: Mapping[str, Any]) -> Interval:
    """An end that too few rounds can't bound is null in run.json: it is drawn as far as the estimate is, twice."""
    low, high = one["ci"]
    estimate = one["estimate"]
    return (estimate / 2 if low is None else low), (estimate * 2 if high is None else high)
