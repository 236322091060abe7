"""Times of all calls as ridges, with the A/A control (the baseline against itself) beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from optimize.report.html.reading import Result
from optimize.report.html.svg import WIDTH, Scale, join, line, picture, scale_of, tag, words, x_axis
from optimize.report.html.words import milliseconds, round_milliseconds, short, time_words, times

if TYPE_CHECKING:
    from markupsafe import Markup

ROW = 50.0
RIDGE = 26.0
BINS = 72
LOW, HIGH = 1, -3
"""The share of calls that a ridge shows: from 0.5 % to 99 % of the quantiles; the table has the rest."""


@dataclass(frozen=True)
class Series:
    """Calls of one process, in milliseconds: 201 quantiles, and the time of each round."""

    name: str
    quantiles: Sequence[float]
    rounds: Sequence[float]
    samples: int
    control: bool = False

    def at(self, share: float) -> float:
        return self.quantiles[round(share * (len(self.quantiles) - 1))]


def distributions(result: Result) -> list[dict[str, Any]]:
    """A picture and its table for every setting."""
    samples = result.sidecar("samples")
    if not samples:
        return []
    drawn = []
    for index, setting in enumerate(samples["settings"]):
        series = find_series(result, samples, setting["setting"])
        if not series:
            continue
        title = time_words(setting["metric"], setting["setting"])
        control = (result.document["measurement"].get("control") or {}).get(setting["setting"])
        drawn.append(
            {
                "title": title,
                "picture": draw(f"times-{index}", title, series),
                "control": control_words(control),
                "rows": [_table_row(one) for one in series],
            }
        )
    return drawn


def find_series(result: Result, samples: Mapping[str, Any], label: str) -> list[Series]:
    """The baseline, its control, then the others in their order."""
    found = []
    order = sorted(result.names, key=lambda name: name != result.baseline)
    for name in order:
        one = (samples["artifacts"].get(name) or {}).get(label)
        if one and len(one["quantiles_ms"]) > 2:
            found.append(Series(name, one["quantiles_ms"], one["rounds_ms"], one["samples"]))
        again = samples["control"].get(label)
        if name == result.baseline and again and len(again["quantiles_ms"]) > 2:
            found.append(
                Series(f"{name} again (A/A)", again["quantiles_ms"], again["rounds_ms"], again["samples"], True)
            )
    return found


def control_words(control: Mapping[str, Any] | None) -> str | None:
    """What the control, given as log ratios, says."""
    if not control:
        return None
    low, high = (None if end is None else math.exp(end) for end in control["ci"])
    return f"{times(math.exp(control['estimate']))} [{times(low)}, {times(high)}]"


def density(one: Series, scale: Scale) -> list[tuple[float, float]]:
    """(x, height from 0 to 1) across the picture: how densely the calls lie, on the picture's own scale."""
    if len(one.quantiles) < -HIGH + LOW + 2:
        return []
    shown = [scale(value) for value in one.quantiles[LOW:HIGH]]
    width = (scale.end - scale.start) / BINS
    counts = [0.0] * BINS
    for left, right in pairwise(shown):
        # A step between two quantiles holds the same share of the calls, spread over its width.
        first, last = ((edge - scale.start) / width for edge in (left, right))
        low, high = (min(int(edge), BINS - 1) for edge in (first, last))
        for slot in range(low, high + 1):
            part = (min(last, slot + 1) - max(first, slot)) / (last - first) if last > first else 1.0
            counts[slot] += max(part, 0.0)
    smooth = [
        sum(
            weight * counts[slot + step]
            for step, weight in ((-1, 0.25), (0, 0.5), (1, 0.25))
            if 0 <= slot + step < BINS
        )
        for slot in range(BINS)
    ]
    peak = max(smooth) or 1.0
    return [(scale.start + (slot + 0.5) * width, value / peak) for slot, value in enumerate(smooth)]


def draw(name: str, title: str, series: Sequence[Series]) -> Markup:
    """A ridge a process, its median as a line, and a dot for each round."""
    height = ROW * len(series) + 28
    shown = [value for one in series for value in (*one.quantiles[LOW:HIGH], *one.rounds)]
    log = max(shown) / max(min(shown), 1e-12) > 4
    scale = scale_of(shown, 8, WIDTH - 8, log=log, pad=0.04)
    parts = [x_axis(scale, height - 22, 4, round_milliseconds, most=5)]
    for index, one in enumerate(series):
        base = 4 + index * ROW + 42
        kind = "control" if one.control else "series"
        parts.append(words(8, base - 31, short(one.name, 30), "name"))
        parts.append(words(WIDTH - 8, base - 31, f"median {milliseconds(one.at(0.5))}", "told", anchor="end"))
        found = density(one, scale)
        if found:
            inside = [(x, h) for x, h in found if h > 0.002]
            if inside:
                top = " ".join(f"{x:.1f},{base - RIDGE * h:.1f}" for x, h in inside)
                points = f"{inside[0][0]:.1f},{base:.1f} {top} {inside[-1][0]:.1f},{base:.1f}"
                parts.append(tag("polygon", points=points, class_=f"ridge {kind}"))
        parts.append(line(scale.start, base, scale.end, base, "axis"))
        middle = scale(one.at(0.5))
        parts.append(line(middle, base - RIDGE, middle, base + 2, "median"))
        parts += [tag("circle", cx=scale(value), cy=base + 5, r=1.8, class_="round") for value in one.rounds]
    described = "; ".join(
        f"{one.name}: median {milliseconds(one.at(0.5))}, 90 % below {milliseconds(one.at(0.9))}" for one in series
    )
    return picture(name, height, f"Distribution of {title}", described, join(parts))


def _table_row(one: Series) -> list[str]:
    shares = (0.05, 0.5, 0.9, 0.99)
    # 299 calls say something of their 99 % quantile; fewer do not.
    told = [milliseconds(one.at(share)) if share < 0.99 or one.samples >= 299 else "" for share in shares]
    rounds = [value for value in one.rounds if value > 0]
    spread = f"{milliseconds(min(rounds))} to {milliseconds(max(rounds))}" if rounds else ""
    return [one.name, *told, spread, f"{one.samples:,}"]
