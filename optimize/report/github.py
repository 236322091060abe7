"""What GitHub shows of a run besides a comment: annotations at the recipe's lines, a step's summary and outputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.report.checks import Outcome, checks, place_of, worst_first
from optimize.report.escape import command, one_line
from optimize.report.markdown import comment
from optimize.report.table import summary

A_STEP = 10
"""Annotations of a level that the host shows of one step."""
SUMMARY_BYTES = 1 << 20
"""What the host takes of a step's summary."""
_LEVELS: dict[Outcome, str] = {
    **{"fail": "error", "inconclusive": "error"},
    **{"warned": "warning", "acknowledged": "notice", "pass": "notice"},
}


def annotate(document: Mapping[str, Any], root: Path | None = None) -> str:
    """Workflow commands, one a line, the worst first; where there are more than the host shows, the last counts them.

    `root` is the folder of the checkout, which the host wants paths from.
    """
    error = document["error"]
    if error:
        title = f"optimize: {error.get('stage') or error.get('type') or 'error'}"
        told = error.get("diagnostics") or (error,)
        found = [("error", title, _told(one), one.get("location")) for one in told]
    else:
        found = [
            (_LEVELS[check.outcome], f"{check.outcome}: {check.what}", check.gate["reason"], check.gate.get("location"))
            for check in worst_first(checks(document))
            if check.outcome != "pass"
        ]
        if not found:
            found = [("notice", "optimize", summary(document), None)]
    lines = []
    for level in ("error", "warning", "notice"):
        of_level = [one for one in found if one[0] == level]
        shown = of_level if len(of_level) <= A_STEP else of_level[: A_STEP - 1]
        lines += [
            command(level, message, **_place(location, document, root), title=title)
            for _, title, message, location in shown
        ]
        if hidden := len(of_level) - len(shown):
            lines.append(command(level, f"and {hidden} more, which the job's summary and log have", title="optimize"))
    return "".join(f"{line}\n" for line in lines)


def step_summary(document: Mapping[str, Any], *, used: int = 0) -> str:
    """Markdown for `$GITHUB_STEP_SUMMARY`, of which `used` bytes are written already."""
    return comment(document, limit=SUMMARY_BYTES - used - 1, size=lambda text: len(text.encode()))


def outputs(document: Mapping[str, Any], folder: Path | None) -> str:
    """Lines for `$GITHUB_OUTPUT`: `verdict` (`error` where there is none for that reason), `run` and `summary`."""
    values = {
        "verdict": "error" if document["error"] else document["verdict"] or "none",
        "run": folder / "run.json" if folder else "",
        "promoted": f"{document['recipe']}@{promoted['version']}" if (promoted := document.get("promoted")) else "",
        "summary": summary(document),
    }
    return "".join(f"{name}={one_line(value, 2_000)}\n" for name, value in values.items())


def _told(error: Mapping[str, Any]) -> str:
    return f"{error.get('message', '')}" + (f" (try: {error['hint']})" if error.get("hint") else "")


def _place(location: object, document: Mapping[str, Any], root: Path | None) -> dict[str, Any]:
    """File, line and column; the recipe's file where nothing nearer is known."""
    place = place_of(location)
    file = place[0] if place else document.get("recipe_file")
    if not file:
        return {}
    line, column = (place[1], place[2]) if place else (None, None)
    return {"file": below(str(file), root), "line": line, "col": column}


def below(file: str, root: Path | None) -> str:
    """A file's path from the root of the checkout, with `/`; as it is where it lies elsewhere."""
    if root is not None:
        near = os.path.relpath(Path(file).absolute(), root.absolute())
        if not near.startswith(os.pardir):
            file = near
    return Path(file).as_posix()
