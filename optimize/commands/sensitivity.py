"""`optimize sensitivity`: the table of layers and settings, and what a budget was spent on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType


def numbers(text: str | None) -> list[float] | None:
    """`2,3,4` as numbers. Raises `BadParameter`."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers, such as 2,3,4") from error


def page(found: Mapping[str, Any]) -> RenderableType:
    """A line for each layer, the distance of the answers at every setting with half of its interval; `*` is chosen."""
    from rich.console import Group
    from rich.text import Text

    from optimize.commands.reporting import relative
    from optimize.terminal import plain_table, safe

    budget = found["budget"]
    rows = plain_table(found["by"])
    for setting in found["settings"]:
        rows.add_column(safe(f"{setting:g} {found['knob']}"), justify="right", no_wrap=True)
    for row in found["layers"]:
        chosen = budget["chosen"][row["name"]] if budget else None
        rows.add_row(safe(row["name"]), *(_cell(one, one["setting"] == chosen) for one in row["settings"]))
    parts: list[RenderableType] = [rows, Text(), safe(_caption(found))]
    if budget:
        parts += [safe(line) for line in _spent(found)]
    from pathlib import Path

    return Group(*parts, safe(f"data: {relative(Path(found['file']))}"))


def _cell(one: Mapping[str, Any], chosen: bool) -> Any:
    from rich.text import Text

    value = "no number" if one["distance"] is None else f"{one['distance']:.2g}"
    spread = f" \N{PLUS-MINUS SIGN}{(one['ci'][1] - one['ci'][0]) / 2:.1g}" if one["ci"] else ""
    return Text(value, "bold green" if chosen else "") + Text(spread, "dim") + Text("*" if chosen else " ")


def _caption(found: Mapping[str, Any]) -> str:
    what = (
        "KL divergence from the dense model, in nats" if found["distance"] == "kl" else "1 - cosine to the dense model"
    )
    rows = found["rows"]
    return (
        f"{what}: mean over {rows['compared']} calibration rows with that {found['by']} alone changed, "
        f"half of its {100 * found['confidence']:g} % interval"
    )


def _spent(found: Mapping[str, Any]) -> list[str]:
    budget, knob = found["budget"], found["knob"]
    exact = "the best there is" if not budget["gap"] else f"at most {budget['gap']:.2g} from the best"
    size = f", {budget['size_bytes'] / 1e6:.1f} MB of layers" if "size_bytes" in budget else ""
    lines = [f"chosen: {budget[knob]:.4g} {knob}{size}; if damages add up, {budget['predicted']:.3g} in all ({exact})"]
    if check := budget["check"]:
        lines.append(f"measured together: {_told(check['mix'])}")
        if other := check["uniform"]:
            lines.append(f"{other['setting']:g} {knob} everywhere: {_told(other)}")
        else:
            lines.append("no single setting for all layers fits this budget")
        if (verdict := check["better"]) is not None:
            low, high = check["difference"]["ci"]
            said = {
                "mix": "the mix is better",
                "uniform": "the mix is WORSE than one setting for all: keep that",
                "undecided": "these rows can't tell the mix from one setting for all",
            }[verdict]
            lines.append(f"{said} (difference {check['difference']['distance']:.2g} [{low:.2g}, {high:.2g}])")
    if recipe := budget["recipe"]:
        lost = "" if recipe["comments_kept"] else " (in normal form: its comments could not be kept)"
        lines.append(f"wrote {recipe['path']}{lost}")
    return lines


def _told(one: Mapping[str, Any]) -> str:
    if one["distance"] is None:
        return "answers that are no numbers"
    ends = f" [{one['ci'][0]:.3g}, {one['ci'][1]:.3g}]" if one["ci"] else ""
    loss = "" if one["loss"] is None else f", loss {one['loss']:+.3g}"
    flips = "" if one["flip_rate"] is None else f", {100 * one['flip_rate']:.1f} % other answers"
    return f"{one['distance']:.3g}{ends}{loss}{flips}, {one['size_bytes'] / 1e6:.1f} MB"
