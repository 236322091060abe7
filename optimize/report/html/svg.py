"""Inline SVG: elements, scales, axes and the frame of a picture. Pure; colours and patterns stand in the style sheet.

Coordinates are those of a picture `WIDTH` wide, which the page scales: what is drawn is readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.report.html.words import clean, number

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH = 360.0
CHARACTER = 6.2
"""About the width of a letter of the pictures' type (11 units high)."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. Everything that is no `Markup` is escaped; `class_` and `stroke_width` become `class` and
    `stroke-width`; attributes that are None are left out.
    """
    from markupsafe import Markup, escape

    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child if isinstance(child, Markup) else clean(child)) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>")  # all parts are escaped


def join(parts: Iterable[Markup]) -> Markup:
    from markupsafe import Markup

    return Markup("").join(parts)


def picture(name: str, height: float, title: str, description: str, *body: Markup, width: float = WIDTH) -> Markup:
    """A whole picture; `name` is unique in the page, title and description are what a screen reader says."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-description"),
        *body,
        role="img",
        viewBox=f"0 0 {_plain(width)} {_plain(height)}",
        aria_labelledby=f"{name}-title {name}-description",
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, *, rx: float | None = None) -> Markup:
    return tag("rect", x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_, rx=rx)


def words(x: float, y: float, text: object, class_: str = "", *, anchor: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def mark(shape: str, x: float, y: float, radius: float, class_: str) -> Markup:
    """A `circle`, `square`, `diamond` or `triangle` around a point, all of about the same area."""
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=radius, class_=class_)
    corners: dict[str, Callable[[float], list[tuple[float, float]]]] = {
        "square": lambda r: [
            (-r * 0.89, -r * 0.89),
            (r * 0.89, -r * 0.89),
            (r * 0.89, r * 0.89),
            (-r * 0.89, r * 0.89),
        ],
        "diamond": lambda r: [(0, -r * 1.25), (r * 1.25, 0), (0, r * 1.25), (-r * 1.25, 0)],
        "triangle": lambda r: [(0, -r * 1.35), (r * 1.17, r * 0.67), (-r * 1.17, r * 0.67)],
    }
    points = " ".join(f"{_plain(x + dx)},{_plain(y + dy)}" for dx, dy in corners[shape](radius))
    return tag("polygon", points=points, class_=class_)


@dataclass(frozen=True)
class Scale:
    """From values to coordinates; monotone, and never outside `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._at(self.low), self._at(self.high)
        share = (self._at(value) - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside, at most about so many."""
        if self.log:
            found = _log_ticks(self.low, self.high)
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / most)]
        return _linear_ticks(self.low, self.high, most)

    def _at(self, value: float) -> float:
        if not self.log:
            return value
        return math.log(max(value, self.low * 1e-3, 1e-300))


def scale_of(
    values: Iterable[float | None],
    start: float,
    end: float,
    *,
    log: bool = False,
    pad: float = 0.06,
    zero: bool = False,
) -> Scale:
    """A scale that holds all finite values (on a logarithmic one: the positive ones) with some air around them.

    With `zero` it begins at 0, so that lengths may be compared.
    """
    known = [float(v) for v in values if v is not None and math.isfinite(v) and (v > 1e-250 or not log)]
    if not known:
        return Scale(1.0 if log else 0.0, 10.0 if log else 1.0, start, end, log)
    low, high = min(known), max(known)
    if log:
        factor = max((high / low) ** pad, 1.05) if high / low < 1e300 else 10.0
        return Scale(low / factor, high * factor, start, end, True)
    air = (high - low) * pad or abs(high) * 0.1 or 1.0
    if zero:
        return Scale(min(0.0, low), max(high + (high * pad or 1.0), 1e-12), start, end)
    return Scale(low - air, high + air, start, end)


def x_axis(scale: Scale, y: float, top: float, show: Callable[[float], str] = number, most: int = 5) -> Markup:
    """Ticks below `y` with lines up to `top`; labels that would touch are left out."""
    parts, after = [line(scale.start, y, scale.end, y, "axis")], -math.inf
    for value in scale.ticks(most):
        x, text = scale(value), show(value)
        half = len(text) * CHARACTER / 2
        parts.append(line(x, top, x, y, "grid"))
        middle = min(max(x, half), WIDTH - half)
        if middle - half < after:
            continue
        after = middle + half + 4
        parts.append(words(middle, y + 14, text, "tick", anchor="middle"))
    return join(parts)


def y_axis(scale: Scale, x: float, right: float, show: Callable[[float], str] = number, most: int = 5) -> Markup:
    """Ticks left of `x` with lines to `right`."""
    parts = [line(x, scale.start, x, scale.end, "axis")]
    for value in scale.ticks(most):
        y = scale(value)
        parts += [line(x, y, right, y, "grid"), words(x - 5, y + 4, show(value), "tick", anchor="end")]
    return join(parts)


def whisker(scale: Scale, y: float, ci: Sequence[float | None], class_: str, cap: float = 4.0) -> Markup:
    """A horizontal interval with caps; an end that is unknown runs to the frame, without a cap."""
    low, high = ci
    left, right = (scale(end) if end is not None else edge for end, edge in ((low, scale.start), (high, scale.end)))
    caps = [
        line(x, y - cap, x, y + cap, class_)
        for x, end in ((left, low), (right, high))
        if end is not None and scale.holds(end)
    ]
    return join([line(left, y, right, y, class_), *caps])


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    if not high > low:
        return [low]
    rough = (high - low) / max(most, 1)
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    if power == 0:
        return [low]
    step = next((power * factor for factor in (1, 2, 2.5, 5) if power * factor >= rough), power * 10)
    first, last = math.ceil(low / step), math.floor(high / step)
    if last - first > 4 * most:
        return [low, high]
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if high / low <= 1e3 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in steps]
    return [value for value in found if low <= value <= high]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return clean(value)
