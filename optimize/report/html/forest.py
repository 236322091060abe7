"""Estimates with their intervals below each other, beside the line of no change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimize.report.html.gates import GLYPHS
from optimize.report.html.svg import WIDTH, join, line, mark, picture, scale_of, whisker, words, x_axis
from optimize.report.html.words import in_unit, interval, number, short

if TYPE_CHECKING:
    from markupsafe import Markup

ROW = 34.0


@dataclass(frozen=True)
class Entry:
    name: str
    estimate: float
    ci: Sequence[float | None]
    verdict: str = ""


def draw(name: str, title: str, entries: Sequence[Entry], nothing: float, unit: str) -> Markup:
    """`nothing` is the value of no change: 0 of a difference, 1 of a ratio."""
    height = ROW * len(entries) + 28
    values = [value for entry in entries for value in (entry.estimate, *entry.ci)]
    positive = [value for value in values if value is not None and value > 0]
    log = unit != "difference" and len(positive) == len(values) and max(positive) / min(positive) > 8
    scale = scale_of([nothing, *values], 8, WIDTH - 8, log=log, pad=0.05)
    parts = [
        x_axis(scale, height - 22, 4, number if unit == "difference" else lambda value: f"{number(value)}×", most=5),
        line(scale(nothing), 4, scale(nothing), height - 22, "limit"),
    ]
    for index, entry in enumerate(entries):
        y = 4 + index * ROW + 22
        told = in_unit(entry.estimate, unit)
        parts += [
            words(8, y - 9, short(f"{entry.name} {GLYPHS.get(entry.verdict, '')}", 32), "name"),
            words(WIDTH - 8, y - 9, told, "told", anchor="end"),
            whisker(scale, y, entry.ci, "interval"),
            mark("circle", scale(entry.estimate), y, 4.5, "estimate"),
        ]
    described = "; ".join(
        f"{entry.name}: {in_unit(entry.estimate, unit)} {interval(entry.ci, unit)} {entry.verdict}".strip()
        for entry in entries
    )
    return picture(name, height, f"{title} over each run's baseline", described, join(parts))
