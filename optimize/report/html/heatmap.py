"""What stages found out of each layer, as a heat map: blocks of the model down, the kinds of their layers across.

Any {layer: {setting: value}} will do. Dark is large, and every cell says its value, so that no colour is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.report.html.reading import Result
from optimize.report.html.svg import WIDTH, join, picture, rect, tag, words
from optimize.report.html.words import number, short

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_CELLS = 900
STEPS = 8
CELL = 19.0
LEFT = 62.0
_NUMBER = re.compile(r"(?:^|(?<=[./_]))\d+(?=$|[./_])")


@dataclass(frozen=True)
class Grid:
    """`values` [row][column]; None: no such layer, or nothing known of it."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


def heatmaps(result: Result) -> list[dict[str, Any]]:
    """For every artifact with a table of layers: a picture for each setting, and the table."""
    drawn = []
    for index, (name, table) in enumerate((result.sidecar("layers") or {}).items()):
        if name not in result.names:
            continue
        settings = settings_of(table["layers"])
        pictures = []
        everything = [v for values in table["layers"].values() for v in values.values() if v is not None]
        for column, setting in enumerate(settings):
            grid = grid_of({layer: values.get(setting) for layer, values in table["layers"].items()})
            pictures.append(
                {
                    "setting": setting,
                    "picture": draw(
                        f"layers-{index}-{column}", f"{name}: {table['title']}, {setting}", grid, everything
                    ),
                }
            )
        rows = [
            [
                layer,
                *(number(values.get(setting), 3) if values.get(setting) is not None else "" for setting in settings),
            ]
            for layer, values in table["layers"].items()
        ]
        drawn.append(
            {
                "artifact": name,
                "title": table["title"],
                "settings": settings,
                "pictures": pictures,
                "rows": rows[:MOST_CELLS],
                "left_out": max(len(rows) - MOST_CELLS, 0),
                "worst": worst(table["layers"], settings[0]) if settings else [],
                "kept": table.get("kept") or [],
                "steps": range(STEPS),
            }
        )
    return drawn


def settings_of(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(setting for values in layers.values() for setting in values))


def worst(layers: Mapping[str, Mapping[str, float | None]], setting: str, most: int = 3) -> list[str]:
    """The layers with the largest values, in words."""
    known = [(value, layer) for layer, values in layers.items() if (value := values.get(setting)) is not None]
    return [f"{layer} ({number(value, 3)})" for value, layer in sorted(known, key=lambda pair: -pair[0])[:most]]


def grid_of(values: Mapping[str, float | None]) -> Grid:
    """Layers with a number in their name by that number and the rest of the name; others in a list."""
    places = {layer: _place(layer) for layer in values}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    if len(kinds) > 16 or len(set(places.values())) < len(values) or len(kinds) * len(blocks) > 3 * len(values) + 16:
        # The names have no such pattern: a column for each of a few, in their order.
        layers = list(values)[:MOST_CELLS]
        width = min(14, max(1, math.ceil(math.sqrt(len(layers)))))
        rows = [layers[start : start + width] for start in range(0, len(layers), width)]
        cells = [[values[layer] for layer in row] + [None] * (width - len(row)) for row in rows]
        return Grid([f"{i * width + 1}…" for i in range(len(rows))], [str(i + 1) for i in range(width)], cells)
    at = {place: values[layer] for layer, place in places.items()}
    blocks = blocks[: max(MOST_CELLS // len(kinds), 1)]
    return Grid(blocks, kinds, [[at.get((block, kind)) for kind in kinds] for block in blocks])


def draw(name: str, title: str, grid: Grid, everything: list[float]) -> Markup:
    """`everything` sets the scale, which pictures beside each other share."""
    names = max((len(column) for column in grid.columns), default=0)
    head = min(names * 5.0, 110.0) * 0.72 + 12
    width = min(CELL * 1.6, (WIDTH - LEFT - 40) / max(len(grid.columns), 1))
    height = head + CELL * len(grid.rows) + 6
    level = levels(everything)
    parts = []
    for column, text in enumerate(grid.columns):
        x = LEFT + (column + 0.5) * width
        turn = f"rotate(-46 {x:.1f} {head - 4:.1f})"
        parts.append(tag("text", short(text, 22), x=x, y=head - 4, class_="tick", transform=turn))
    for row, block in enumerate(grid.rows):
        y = head + row * CELL
        parts.append(words(LEFT - 5, y + CELL - 6, short(block, 9), "tick", anchor="end"))
        for column, value in enumerate(grid.values[row]):
            if value is None:
                continue
            at = level(value)
            cell = rect(LEFT + column * width, y, width - 1.5, CELL - 1.5, f"heat-{at}", rx=2)
            told = tag("title", f"{block} {grid.columns[column]}: {number(value, 3)}")
            parts.append(tag("g", told, cell))
    known = [v for values in grid.values for v in values if v is not None]
    low, high = (min(known), max(known)) if known else (None, None)
    described = f"{len(known)} layers, from {number(low, 3)} to {number(high, 3)}. The table below has each."
    return picture(name, height, title, described, join(parts))


def levels(values: list[float]) -> Any:
    """value -> 0 (smallest) to STEPS - 1 (largest), by equal ratios where values span more than a decade."""
    known = [value for value in values if math.isfinite(value)]
    positive = [value for value in known if value > 0]
    log = bool(positive) and max(positive) / min(positive) > 10 and min(known) >= 0

    def at(value: float) -> float:
        return math.log(max(value, min(positive))) if log else value

    low, high = (at(min(known)), at(max(known))) if known else (0.0, 0.0)

    def level(value: float) -> int:
        if high <= low:
            return 0
        return min(int((at(value) - low) / (high - low) * STEPS), STEPS - 1)

    return level


def _place(layer: str) -> tuple[str, str]:
    """(block, kind): `model.layers.3.self_attn.q_proj` is block `3` and kind `self_attn.q_proj`."""
    found = _NUMBER.search(layer)
    if not found:
        return "", layer
    kind = layer[found.end() :].strip("./_") or layer[: found.start()].strip("./_")
    return found.group(), kind
