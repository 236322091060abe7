"""The chain of stages and what each cost: one waterfall a quantity, from each artifact's parent to itself.

Forks are branches of the same tree: an artifact stands below what it was made from, one step to the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from optimize.report.html.reading import Result
from optimize.report.html.svg import CHARACTER, WIDTH, join, line, picture, rect, scale_of, words, x_axis
from optimize.report.html.words import (
    bytes_words,
    in_unit,
    interval,
    milliseconds,
    number,
    round_milliseconds,
    short,
    time_words,
)

if TYPE_CHECKING:
    from markupsafe import Markup

Trend = Literal["better", "worse", "same", "unclear", "start"]
SIGNS: dict[Trend, str] = {"better": "▲", "worse": "▼", "same": "=", "unclear": "≈", "start": "•"}
WORDS: dict[Trend, str] = {
    "better": "better",
    "worse": "worse",
    "same": "the same",
    "unclear": "not told apart",
    "start": "start",
}
ROW = 40.0
INDENT = 10.0


@dataclass(frozen=True)
class Step:
    """An artifact in a waterfall; `before` is its parent's value, None at a root."""

    name: str
    stage: str
    depth: int
    value: float | None
    before: float | None
    trend: Trend
    change: str = ""
    """What the step did, in words of the page: `2.34× [2.30×, 2.38×]`."""


def tree(result: Result) -> list[tuple[str, int]]:
    """(name, depth) of every artifact, each after its parent, in the order of the chain."""
    children: dict[str | None, list[str]] = {}
    for name in result.names:
        children.setdefault(result.parent(name), []).append(name)
    found: list[tuple[str, int]] = []

    def visit(name: str, depth: int) -> None:
        if name in (one for one, _ in found):
            return
        found.append((name, depth))
        for child in children.get(name, ()):
            # A chain goes on at the same depth; only a fork's branches step to the right.
            visit(child, depth + (len(children[name]) > 1))

    for root in children.get(None, ()):
        visit(root, 0)
    return found + [(name, 0) for name in result.names if name not in (one for one, _ in found)]


def waterfalls(result: Result) -> list[dict[str, Any]]:
    """A picture and its table for the first metric, every time, and the size."""
    if len(result.artifacts) < 2:
        return []
    quantities: list[tuple[str, str, str | None, Callable[[float | None], str], bool]] = [
        (metric, metric, None, number, False) for metric in result.qualities[:1]
    ]
    quantities += [(time_words(phase, at), phase, at, milliseconds, True) for phase, at in result.times]
    quantities.append(("size", "size", None, bytes_words, True))
    drawn = []
    for index, (title, metric, setting, show, from_zero) in enumerate(quantities):
        steps = find_steps(result, metric, setting)
        if sum(step.value is not None for step in steps) < 2:
            continue
        rows = [
            [
                ("↳ " * step.depth) + step.name,
                step.stage,
                show(step.value),
                step.change,
                f"{SIGNS[step.trend]} {WORDS[step.trend]}",
            ]
            for step in steps
        ]
        drawn.append(
            {"title": title, "picture": draw(f"waterfall-{index}", title, steps, show, zero=from_zero), "rows": rows}
        )
    return drawn


def find_steps(result: Result, metric: str, setting: str | None) -> list[Step]:
    """Every artifact's step in one quantity."""

    def value(name: str) -> float | None:
        if metric == "size":
            return float(result.artifact(name)["size_bytes"])
        return result.quality(name, metric) if setting is None else result.milliseconds(name, metric, setting)

    steps = []
    for name, depth in tree(result):
        parent = result.parent(name)
        before = value(parent) if parent else None
        trend, text = _change(result, name, parent, metric, setting) if before is not None else ("start", "")
        steps.append(Step(name, result.artifact(name)["stage"], depth, value(name), before, trend, text))
    return steps


def _change(result: Result, name: str, parent: str | None, metric: str, setting: str | None) -> tuple[Trend, str]:
    """Better or worse only where an interval says so."""
    found = result.compared(name, parent, metric, setting)
    if found is None and metric == "size" and parent:
        ratio = result.artifact(name)["size_bytes"] / result.artifact(parent)["size_bytes"]
        found = {"estimate": ratio, "ci": [ratio, ratio], "unit": "ratio"}
    if found is None or found["estimate"] is None:
        return "unclear", "not compared"
    low, high = found["ci"]
    nothing = 0.0 if found["unit"] == "difference" else 1.0
    exact = low is not None and low == high
    text = in_unit(found["estimate"], found["unit"]) + ("" if exact else f" {interval(found['ci'], found['unit'])}")
    if exact and found["unit"] != "difference" and 0.995 < low < 1.005 and low != nothing:
        text = f"{low:.4f}×"  # two digits would call it no change
    higher = found["unit"] == "speedup" or (found["unit"] == "difference" and result.higher_is_better(metric))
    up, down = low is not None and low > nothing, high is not None and high < nothing
    if exact and low == nothing:
        return "same", text
    if not (up or down):
        return "unclear", text
    return ("better" if up == higher else "worse"), text


def draw(name: str, title: str, steps: Sequence[Step], show: Callable[[float | None], str], *, zero: bool) -> Markup:
    """Bars from the parent's value to the artifact's own; with `zero` a root's bar begins at 0."""
    height = ROW * len(steps) + 30
    # Small changes of a quality would not be seen on an axis from 0: there, bars are differences and no lengths.
    scale = scale_of([value for step in steps for value in (step.value, step.before)], 8, WIDTH - 8, zero=zero)
    bottom = height - 22
    parts = [x_axis(scale, bottom, 4, round_milliseconds if show is milliseconds else show, most=5)]
    for index, step in enumerate(steps):
        y = 4 + index * ROW
        indent = 8 + INDENT * step.depth
        told = f"{SIGNS[step.trend]} {step.change or show(step.value)}"
        room = int((WIDTH - 16 - indent - len(told) * CHARACTER) / CHARACTER)
        parts.append(words(indent, y + 12, ("↳ " if step.depth else "") + short(step.name, max(room - 2, 6)), "name"))
        parts.append(words(WIDTH - 8, y + 12, told, f"told {step.trend}", anchor="end"))
        if step.value is None or not math.isfinite(step.value):
            continue
        at, top = scale(step.value), y + 18
        start = scale(step.before) if step.before is not None else scale.start if zero else None
        if step.before is not None and start is not None:
            parts.append(line(start, top - 3, start, top + 15, "from"))
        if start is not None:
            left, right = min(start, at), max(start, at)
            parts.append(rect(left, top, max(right - left, 1.5), 12, f"step {step.trend}"))
        parts.append(line(at, top - 3, at, top + 15, "to"))
    described = "; ".join(
        f"{step.name}: {show(step.value)}" + (f", {WORDS[step.trend]} ({step.change})" if step.change else "")
        for step in steps
    )
    return picture(name, height, f"What each stage did to {title}", described, join(parts))
