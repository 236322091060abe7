"""The damage's tail: how far answers lie from the baseline's in the middle and in the worst rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.report.html.reading import Result
from optimize.report.html.svg import WIDTH, join, line, mark, picture, scale_of, words, x_axis
from optimize.report.html.words import number, short

if TYPE_CHECKING:
    from markupsafe import Markup

POINTS = (
    ("median", "median", "circle"),
    ("p99", "99 %", "triangle"),
    ("p999", "99.9 %", "square"),
    ("max", "largest", "diamond"),
)
_TITLES = {
    "kl": "divergence (KL, in nats)",
    "cosine_distance": "cosine distance",
    "difference": "difference of the answers",
}
ROW = 36.0
NOISE = 1e-7
"""What float arithmetic alone does: smaller distances stand at the left end, or they would stretch the axis."""


@dataclass(frozen=True)
class Tail:
    """`points` are (what, shape, value), from the middle outwards."""

    name: str
    points: tuple[tuple[str, str, float], ...]


def tails(result: Result) -> list[dict[str, Any]]:
    """A picture and its table for every distance that fidelity has, over the baseline."""
    distances = list(
        dict.fromkeys(
            key
            for one in result.artifacts
            for key, value in _fidelity(one, "baseline").items()
            if isinstance(value, Mapping) and "max" in value
        )
    )
    drawn = []
    for distance in sorted(
        distances, key=lambda one: (one not in _TITLES, list(_TITLES).index(one) if one in _TITLES else 0)
    ):
        found = find_tails(result, distance)
        title = _TITLES.get(distance, distance.replace("_", " "))
        if found and any(value > NOISE for one in found for _, _, value in one.points):
            picture_ = draw(f"tail-{distance}", title, found)
            drawn.append({"title": title, "picture": picture_, "rows": _rows(result, distance)})
    return drawn


def find_tails(result: Result, distance: str) -> list[Tail]:
    found = []
    for one in result.artifacts:
        spread = _fidelity(one, "baseline").get(distance) or {}
        points = tuple(
            (what, shape, float(spread[key]))
            for key, what, shape in POINTS
            if isinstance(spread.get(key), (int, float))
        )
        if points:
            found.append(Tail(one["name"], points))
    return found


def draw(name: str, title: str, found: Sequence[Tail]) -> Markup:
    """A row an artifact on a logarithmic axis; what is 0 stands at its left end."""
    height = ROW * len(found) + 28
    values = [value for one in found for _, _, value in one.points if value > NOISE]
    scale = scale_of(values, 14, WIDTH - 14, log=True)
    parts = [x_axis(scale, height - 22, 4, number, most=5)]
    for index, one in enumerate(found):
        y = 4 + index * ROW + 24
        largest = one.points[-1][2]
        parts.append(words(8, y - 12, short(one.name, 30), "name"))
        parts.append(words(WIDTH - 8, y - 12, f"{one.points[-1][0]} {number(largest, 3)}", "told", anchor="end"))
        at = [scale(max(value, scale.low)) for _, _, value in one.points]
        parts.append(line(min(at), y, max(at), y, "bar candidate"))
        parts += [mark(shape, x, y, 4.5, f"quantile {shape}") for x, (_, shape, _) in zip(at, one.points, strict=True)]
    described = "; ".join(
        f"{one.name}: " + ", ".join(f"{what} {number(value, 3)}" for what, _, value in one.points) for one in found
    )
    return picture(name, height, f"{title} from the baseline", described, join(parts))


def _rows(result: Result, distance: str) -> list[list[str]]:
    rows = []
    for one in result.artifacts:
        for role in ("baseline", "parent"):
            fidelity = _fidelity(one, role)
            spread = fidelity.get(distance)
            if not isinstance(spread, Mapping):
                continue
            over = result.baseline if role == "baseline" else result.parent(one["name"])
            if role == "parent" and over == result.baseline:
                continue
            values = [
                number(spread.get(key), 3) if key in spread else "" for key in ("mean", "median", "p99", "p999", "max")
            ]
            rows.append([one["name"], str(over), *values])
    return rows


def _fidelity(artifact: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    return (artifact["scores"].get("fidelity") or {}).get(role) or {}
