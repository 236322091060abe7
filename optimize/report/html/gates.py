"""The gates: each with its interval, limit and margin, drawn as a small plot of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optimize.report.html.reading import Result
from optimize.report.html.svg import (
    WIDTH,
    Scale,
    join,
    line,
    mark,
    picture,
    rect,
    scale_of,
    whisker,
    words,
)
from optimize.report.html.words import bytes_words, change, in_unit, milliseconds, number, setting_words, times

if TYPE_CHECKING:
    from markupsafe import Markup

GLYPHS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
_LIMITS: dict[str, tuple[str, str, int]] = {
    # limit: (unit, words, the side where values are good)
    "min": ("absolute", "at least", 1),
    "max": ("absolute", "at most", -1),
    "max_ms": ("ms", "at most", -1),
    "max_drop": ("difference", "at least", 1),
    "max_increase": ("difference", "at most", -1),
    "min_ratio": ("ratio", "at least", 1),
    "max_ratio": ("ratio", "at most", -1),
    "min_speedup": ("speedup", "at least", 1),
}
_ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}
HEIGHT = 46.0


def gate_rows(result: Result) -> list[dict[str, Any]]:
    """What the page's table says of each gate, the worst verdict and the smallest margin first."""
    confirmation = result.document.get("confirmation") or {}
    gates = [(gate, False) for gate in result.document["gates"]]
    gates += [(gate, True) for gate in confirmation.get("gates", ())]
    gates.sort(key=lambda pair: (_ORDER.get(pair[0]["verdict"], 3), _closeness(pair[0])))
    return [_row(gate, f"gate-{number}", again) for number, (gate, again) in enumerate(gates)]


def _row(gate: Mapping[str, Any], name: str, again: bool) -> dict[str, Any]:
    (limit,) = gate["limit"].items()
    unit, words_, side = _LIMITS[limit[0]]
    show = _shower(gate["metric"], unit)
    bound = -limit[1] if limit[0] == "max_drop" else limit[1]
    low, high = gate["ci"]
    exact = low is not None and low == high
    return {
        "what": f"{gate['metric']} of {gate['artifact']}",
        "over": gate["over"],
        "setting": setting_words(gate["setting"]),
        "value": show(gate["estimate"]),
        "interval": "exact" if exact else f"{show(low)} to {show(high)}",
        "limit": f"{words_} {show(bound)}",
        "limit_name": limit[0],
        "margin": _margin(gate, unit),
        "verdict": gate["verdict"],
        "glyph": GLYPHS.get(gate["verdict"], "?"),
        "reason": gate["reason"],
        "again": again,
        "location": gate.get("location"),
        "acknowledged": gate.get("acknowledged"),
        "warns": gate.get("on_inconclusive") == "warn" and gate["verdict"] == "inconclusive",
        "picture": draw_gate(name, gate["estimate"], gate["ci"], bound, side, gate["verdict"], show, gate["reason"]),
    }


def draw_gate(
    name: str,
    estimate: float | None,
    ci: Any,
    limit: float,
    side: int,
    verdict: str,
    show: Any = number,
    reason: str = "",
) -> Markup:
    """An interval beside its limit; the good side of it (`side` 1: right, -1: left) is hatched."""
    scale = gate_scale(estimate, ci, limit)
    at, middle = scale(limit), 18.0
    left, right = (at, scale.end) if side > 0 else (scale.start, at)
    parts = [
        rect(left, 4, right - left, 28, "allowed"),
        line(scale.start, middle, scale.end, middle, "axis"),
        line(at, 2, at, 34, "limit"),
        words(_inside(at, show(limit)), 44, show(limit), "tick", anchor="middle"),
        whisker(scale, middle, ci, f"interval {verdict}", cap=6),
    ]
    if estimate is not None and math.isfinite(estimate):
        parts.append(mark("circle", scale(estimate), middle, 5, f"estimate {verdict}"))
    text = f"{verdict}: {reason}. The shaded side of the dashed line is allowed."
    return picture(name, HEIGHT, "The gate's interval and its limit", text, join(parts))


def gate_scale(estimate: float | None, ci: Any, limit: float) -> Scale:
    """Holds the interval and the limit, with air on both sides of each."""
    return scale_of([estimate, limit, *ci], 8, WIDTH - 8, pad=0.18)


def _inside(x: float, text: str) -> float:
    half = len(text) * 3.2
    return min(max(x, half), WIDTH - half)


def _shower(metric: str, unit: str) -> Callable[[float], str]:
    if unit == "ms":
        return milliseconds
    if unit == "absolute" and metric in ("size", "peak_memory"):
        return bytes_words
    if unit == "absolute" and metric in ("latency", "prefill", "decode"):
        return milliseconds
    return lambda value: in_unit(value, unit)


def _margin(gate: Mapping[str, Any], unit: str) -> str:
    margin = gate["margin"]
    if margin is None:
        return "?"
    if unit in ("ratio", "speedup"):
        return change(margin).replace(".000", ".00") if abs(margin) < 0.0005 else _two(margin)
    if unit == "difference":
        return change(margin)
    shown: str = _shower(gate["metric"], unit)(abs(margin))
    return ("+" if margin >= 0 else "−") + shown


def _two(value: float) -> str:
    sign = "+" if value >= 0 else "−"
    return f"{sign}{times(abs(value))}"


def _closeness(gate: Mapping[str, Any]) -> float:
    (limit,) = gate["limit"].values()
    return math.inf if gate["margin"] is None else gate["margin"] / max(abs(limit), 1e-9)
