"""The trade: quality over time, size as area, with the intervals of the comparison with the baseline.

A point stands where the baseline's own value, moved by that comparison, is: so the bars are the intervals that gates
decide on, and the baseline has none.

An artifact is called dominated only where the intervals support it: another one is at least as good in quality, time
and size, and better in one of them, each by an interval of 90 % that lies wholly on that side (a one-sided test at 5 %
for each; the claim needs all of them). Where the two were not compared with each other, both intervals over the
baseline must lie apart, which is stricter than a comparison, however the two depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.report.html.reading import Result
from optimize.report.html.svg import (
    CHARACTER,
    WIDTH,
    Scale,
    join,
    line,
    mark,
    picture,
    scale_of,
    words,
    x_axis,
    y_axis,
)
from optimize.report.html.words import interval, milliseconds, number, round_milliseconds, short, time_words
from optimize.report.table import megabytes

if TYPE_CHECKING:
    from markupsafe import Markup

HEIGHT = 300.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 16.0, 36.0
LARGEST = 15.0
"""The radius of the largest artifact."""


@dataclass(frozen=True)
class Point:
    """An artifact: x in milliseconds, y in the metric's unit; intervals are None for the baseline."""

    name: str
    x: float
    y: float
    size: float
    x_ci: tuple[float | None, float | None] | None
    y_ci: tuple[float | None, float | None] | None
    dominated_by: str | None = None

    @property
    def is_baseline(self) -> bool:
        return self.x_ci is None


@dataclass(frozen=True)
class Line:
    """A gate as a line; `vertical` ones limit the time."""

    vertical: bool
    at: float
    words: str


def pareto(result: Result) -> list[dict[str, Any]]:
    """A picture and its table for every time that was measured, of the first of the task's metrics."""
    if not result.qualities or not result.baseline:
        return []
    metric = result.qualities[0]
    drawn = []
    for index, (phase, setting) in enumerate(result.times):
        points = find_points(result, metric, phase, setting)
        if len(points) < 2:
            continue
        lines = gate_lines(result, points, metric, phase, setting)
        drawn.append(
            {
                "title": time_words(phase, setting),
                "picture": draw(f"pareto-{index}", points, lines, metric, time_words(phase, setting)),
                "rows": [_table_row(result, point, metric, phase, setting) for point in points],
                "metric": metric,
                "less": not result.higher_is_better(metric),
                "limits": [one.words for one in lines],
            }
        )
    return drawn


def find_points(result: Result, metric: str, phase: str, setting: str) -> list[Point]:
    """The artifacts with both measures, the baseline first."""
    base = result.baseline
    if base is None:
        return []
    y, x = result.quality(base, metric), result.milliseconds(base, phase, setting)
    if x is None or y is None:
        return []
    found = [Point(base, x, y, float(result.artifact(base)["size_bytes"]), None, None)]
    for name in result.names:
        quality, speed = result.compared(name, base, metric), result.compared(name, base, phase, setting)
        if name == base or not quality or not speed or quality["estimate"] is None or not speed["estimate"]:
            continue
        low, high = quality["ci"]
        slow, fast = speed["ci"]
        found.append(
            Point(
                name,
                x / speed["estimate"],
                y + quality["estimate"],
                float(result.artifact(name)["size_bytes"]),
                (None if not fast else x / fast, None if not slow else x / slow),
                (None if low is None else y + low, None if high is None else y + high),
                dominated_by=dominated_by(result, name, metric),
            )
        )
    return found


def dominated_by(result: Result, name: str, metric: str) -> str | None:
    """Another artifact that is surely no worse in quality, size and every time, and surely better in one."""
    for other in result.names:
        if other != name and _dominates(result, other, name, metric):
            return other
    return None


def _dominates(result: Result, other: str, name: str, metric: str) -> bool:
    ours, theirs = result.artifact(other)["size_bytes"], result.artifact(name)["size_bytes"]
    if ours > theirs or not result.times:
        return False
    quality = _surely_better(result, other, name, metric, None, higher=result.higher_is_better(metric))
    return quality and all(
        _surely_better(result, other, name, phase, setting, higher=True) for phase, setting in result.times
    )


def _surely_better(result: Result, ours: str, theirs: str, metric: str, setting: str | None, *, higher: bool) -> bool:
    """Whether the interval of a comparison says so; `higher` of its estimate (times are speed-ups) is better."""
    direct = result.compared(ours, theirs, metric, setting)
    if direct is not None:
        low, high = direct["ci"]
        nothing = 0.0 if direct["unit"] == "difference" else 1.0
        return (low is not None and low > nothing) if higher else (high is not None and high < nothing)
    pair = [result.compared(name, result.baseline, metric, setting) for name in (ours, theirs)]
    if pair[0] is None or pair[1] is None:
        return False
    (our_low, our_high), (their_low, their_high) = pair[0]["ci"], pair[1]["ci"]
    near, far = (our_low, their_high) if higher else (their_low, our_high)
    return near is not None and far is not None and near > far


def gate_lines(result: Result, points: Sequence[Point], metric: str, phase: str, setting: str) -> list[Line]:
    """The gates on these two measures, in the picture's units, each once."""
    at = {point.name: point for point in points}
    base = points[0]
    found: dict[tuple[bool, float], Line] = {}
    for gate in result.document["gates"]:
        ((name, limit),) = gate["limit"].items()
        over = at.get(gate["over"] or base.name, base)
        line_: Line | None = None
        if gate["metric"] == metric:
            places = {
                "min": limit,
                "max": limit,
                "max_drop": over.y - limit,
                "max_increase": over.y + limit,
                "min_ratio": over.y * limit,
                "max_ratio": over.y * limit,
            }
            if name in places:
                line_ = Line(False, places[name], f"{metric}: {_limit_words(gate, name, limit)}")
        elif gate["metric"] == phase and gate["setting"] == setting:
            places = {"max_ms": limit, "max": limit, "min_speedup": over.x / limit, "max_ratio": over.x * limit}
            if name in places:
                line_ = Line(True, places[name], f"{phase}: {_limit_words(gate, name, limit)}")
        if line_:
            found.setdefault((line_.vertical, line_.at), line_)
    return list(found.values())


def _limit_words(gate: Mapping[str, Any], name: str, limit: float) -> str:
    over = f" over {gate['over']}" if gate["over"] else ""
    return f"{name} {number(limit)}{over}"


def draw(name: str, points: Sequence[Point], lines: Sequence[Line], metric: str, time: str) -> Markup:
    """The picture. Points are drawn from the largest to the smallest, so that none hides another."""
    across, up = scales(points, lines)
    largest = max(point.size for point in points) or 1.0
    parts = [
        x_axis(across, HEIGHT - BOTTOM, TOP, round_milliseconds, most=5),
        y_axis(up, LEFT, WIDTH - RIGHT, number, most=5),
        words(WIDTH - RIGHT, HEIGHT - 4, "time of a call →", "label", anchor="end"),
        words(4, 10, f"↑ {short(metric, 40)}", "label"),
    ]
    for one in lines:
        if one.vertical:
            parts.append(line(across(one.at), TOP, across(one.at), HEIGHT - BOTTOM, "limit"))
        else:
            parts.append(line(LEFT, up(one.at), WIDTH - RIGHT, up(one.at), "limit"))
    order = sorted(points, key=lambda point: -point.size)
    placed = _Labels([(across(p.x), up(p.y), _radius(p.size, largest)) for p in points])
    for point in order:
        x, y, radius = across(point.x), up(point.y), _radius(point.size, largest)
        kind = "baseline" if point.is_baseline else "dominated" if point.dominated_by else "candidate"
        if point.x_ci and point.y_ci:
            left, right = (across(v) if v is not None else e for v, e in zip(point.x_ci, (LEFT, WIDTH), strict=True))
            low, high = (up(v) if v is not None else e for v, e in zip(point.y_ci, (up.start, up.end), strict=True))
            parts += [line(left, y, right, y, f"bar {kind}"), line(x, low, x, high, f"bar {kind}")]
        parts.append(mark("diamond" if point.is_baseline else "circle", x, y, radius, f"point {kind}"))
    for point in order:
        text = short(point.name, 20) + (" (dominated)" if point.dominated_by else "")
        x, y, anchor = placed.place(across(point.x), up(point.y), _radius(point.size, largest), text)
        parts.append(words(x, y, text, "name", anchor=anchor))
    described = "; ".join(
        f"{point.name}: {number(point.y)} at {milliseconds(point.x)}, {megabytes(point.size)}"
        + (f", dominated by {point.dominated_by}" if point.dominated_by else "")
        for point in points
    )
    return picture(name, HEIGHT, f"{metric} over {time}, size as area", described, join(parts))


def scales(points: Sequence[Point], lines: Sequence[Line]) -> tuple[Scale, Scale]:
    """Across in milliseconds (logarithmic where times lie far apart), up in the metric; they hold all that is drawn."""
    xs = [value for p in points for value in (p.x, *(p.x_ci or ()))] + [one.at for one in lines if one.vertical]
    ys = [value for p in points for value in (p.y, *(p.y_ci or ()))] + [one.at for one in lines if not one.vertical]
    known = [value for value in xs if value]
    log = max(known) / min(known) > 4
    across = scale_of(xs, LEFT, WIDTH - RIGHT, log=log, pad=0.14)
    return across, scale_of(ys, HEIGHT - BOTTOM, TOP, pad=0.14)


def _radius(size: float, largest: float) -> float:
    return max(LARGEST * math.sqrt(size / largest), 3.0)


class _Labels:
    """Finds a free place for each name: right, left, above or below its mark."""

    def __init__(self, marks: Sequence[tuple[float, float, float]]) -> None:
        self.boxes = [(x - r, y - r, x + r, y + r) for x, y, r in marks]

    def place(self, x: float, y: float, radius: float, text: str) -> tuple[float, float, str]:
        width = len(text) * CHARACTER
        gap = radius + 5
        steps = (0, -15, 15, -28, 28, -42, 42)
        tries = [(x + gap, y + 4 + dy, "start") for dy in steps] + [(x - gap, y + 4 + dy, "end") for dy in steps]
        tries += [(x, y - gap - 2, "middle"), (x, y + gap + 9, "middle")]
        tries.sort(key=lambda one: abs(one[1] - y - 4))
        best, least = tries[0], math.inf
        for at in tries:
            box = self._box(*at, width)
            outside = sum(
                max(0.0, v) for v in (LEFT + 2 - box[0], box[2] - WIDTH, TOP - box[1], box[3] - HEIGHT + BOTTOM)
            )
            cost = 50 * outside + sum(_overlap(box, other) for other in self.boxes)
            if cost < least - 1e-9:
                best, least = at, cost
        self.boxes.append(self._box(*best, width))
        half = width / 2
        low, high = {"start": (0.0, width), "end": (width, 0.0), "middle": (half, half)}[best[2]]
        return min(max(best[0], LEFT + low), WIDTH - high), best[1], best[2]

    @staticmethod
    def _box(x: float, y: float, anchor: str, width: float) -> tuple[float, float, float, float]:
        left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
        return left, y - 10, left + width, y + 3


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    across, up = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * up if across > 0 and up > 0 else 0.0


def _table_row(result: Result, point: Point, metric: str, phase: str, setting: str) -> list[str]:
    quality = result.compared(point.name, result.baseline, metric)
    speed = result.compared(point.name, result.baseline, phase, setting)
    return [
        point.name,
        number(point.y),
        interval(quality["ci"], "difference") if quality and not point.is_baseline else "",
        milliseconds(point.x),
        interval(speed["ci"], "speedup") if speed and not point.is_baseline else "",
        megabytes(point.size),
        f"by {point.dominated_by}" if point.dominated_by else "no" if not point.is_baseline else "baseline",
    ]
