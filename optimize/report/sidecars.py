"""What a page draws and `run.json` is too small for: written beside it, so that a page needs no store.

- `rows`: the evaluation rows that an artifact answers otherwise than the baseline, each with its text (shortened), the
  baseline's answer and those of the others. At most `MOST_ROWS`: the worst first, and how many were left out.
- `samples`: for each artifact and setting the quantiles of all timed calls and the time of each round; `control` is the
  baseline's second process.
- `layers`: what a stage found out of each layer (sensitivities, errors), as {layer: {setting: value}}.

`rows` holds text of the evaluation split, as `flips.NAME` does; `evaluate: {flips: false}` leaves both out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import digest_of
from optimize.atomic import write_bytes

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.evaluate.timings import Timings

MOST_ROWS = 2000
MOST_CHARACTERS = 280
"""Of a column or an answer."""
QUANTILES = 200
"""Steps of 0.5 %."""
_ROW_KEYS = ("row", "window")
_ANSWER_KEYS = ("baseline", "candidate")


def write(
    subjects: Mapping[str, Artifact], baseline: str, measured: Mapping[str, Path], folder: Path
) -> dict[str, Path]:
    """Name -> file in `folder`, of the sidecars above that have anything to hold.

    `measured` are the sidecars of an evaluation: `latency` and `flips.NAME`.
    """
    found: dict[str, Any] = {}
    flips = {name: measured[f"flips.{name}"] for name in subjects if f"flips.{name}" in measured}
    if flips:
        labels = subjects[baseline].task.get("labels")
        found["rows"] = rows({name: _lines(path) for name, path in flips.items()}, baseline, labels)
    if "latency" in measured:
        from optimize.evaluate.measured import slots_of
        from optimize.evaluate.timings import Timings

        timings = Timings.from_json(json.loads(measured["latency"].read_bytes()))
        if timings.timed:
            found["samples"] = samples(timings, slots_of(subjects))
    if tables := {name: table for name, one in subjects.items() if (table := layers(one.details))}:
        found["layers"] = tables
    paths = {}
    for name, value in found.items():
        path = folder / name / f"{digest_of(value).removeprefix('sha256:')[:40]}.json"
        if not path.exists():
            write_bytes(path, json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
        paths[name] = path
    return paths


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(
    flips: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str, labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """{"baseline", "counts": {artifact: rows}, "rows": [{"row", "columns", "label", "baseline", "answers": {artifact:
    answer}}], "left_out": int}. Rows that most artifacts answer otherwise come first.

    `labels` name the numbers of a `label` column; `label` is None where a row has none.
    """
    merged: dict[Any, dict[str, Any]] = {}
    for name, changed in flips.items():
        for flip in changed:
            number = next(flip[key] for key in _ROW_KEYS if key in flip)
            one = merged.setdefault(number, _row(number, flip, labels))
            one["answers"][name] = _shortened(flip["candidate"])
    order = sorted(merged.values(), key=lambda one: (-len(one["answers"]), one["row"]))
    return {
        "baseline": baseline,
        "counts": {name: len(changed) for name, changed in flips.items()},
        "rows": order[:MOST_ROWS],
        "left_out": max(len(order) - MOST_ROWS, 0),
    }


def _row(number: Any, flip: Mapping[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    columns = {key: value for key, value in flip.items() if key not in (*_ROW_KEYS, *_ANSWER_KEYS, "label")}
    label = flip.get("label")
    if labels and isinstance(label, int) and 0 <= label < len(labels):
        label = labels[label]
    return {
        "row": number,
        "columns": {key: _shortened(value) for key, value in columns.items() if value is not None},
        "label": _shortened(label),
        "baseline": _shortened(flip["baseline"]),
        "answers": {},
    }


def _shortened(value: Any) -> Any:
    """Text no longer than it has to be, floats no longer than they say anything."""
    if isinstance(value, str):
        return value if len(value) <= MOST_CHARACTERS else value[: MOST_CHARACTERS - 1] + "…"
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _shortened(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shortened(item) for item in value[:64]]
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not `splitlines`: text may hold other line ends than the file's own.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# --- samples ----------------------------------------------------------------------------------------------------------


def samples(timings: Timings, slots: Mapping[str, str]) -> dict[str, Any]:
    """{"settings": [{"metric", "setting"}], "artifacts": {name: {setting: series}}, "control": {setting: series}}.

    A series is {"samples": int, "quantiles_ms": [0 %, 0.5 %, ..., 100 %], "rounds_ms": one a kept round}.
    """
    from optimize.evaluate.timings import CONTROL

    def of(slot: str) -> dict[str, Any]:
        return {setting.label: _series(timings, slot, setting.label) for setting in timings.settings}

    return {
        "settings": [{"metric": setting.metric, "setting": setting.label} for setting in timings.settings],
        "artifacts": {name: of(slot) for name, slot in slots.items()},
        "control": of(CONTROL),
    }


def _series(timings: Timings, slot: str, label: str) -> dict[str, Any]:
    import numpy as np

    calls = np.array(timings.samples(slot, label)) * 1e3
    quantiles = np.quantile(calls, np.linspace(0, 1, QUANTILES + 1))
    return {
        "samples": int(calls.size),
        "quantiles_ms": [float(f"{value:.4g}") for value in quantiles],
        "rounds_ms": [float(f"{1e3 * math.exp(value):.5g}") for value in timings.log_seconds(slot, label)],
    }


# --- layers -----------------------------------------------------------------------------------------------------------

_ERRORS = {
    "error": "share of the output's energy that changed",
    "rtn_error": "the same, rounded to nearest",
    "magnitude_error": "the same, pruned by magnitude",
    "zeros": "share of zeros",
}


def layers(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"title", "kept": layers that stay in float, "layers": {layer: {setting: value}}} of what a stage left in its
    artifact's details; None: nothing. Values that are no finite number are None.
    """
    table = details.get("layers")
    if isinstance(table, list) and all(isinstance(row, Mapping) and "name" in row for row in table):
        found = {
            str(row["name"]): {words: _number(row[key]) for key, words in _ERRORS.items() if key in row}
            for row in table
        }
        return _titled("errors of the layers", found)
    for name, part in details.items():
        if isinstance(part, Mapping) and isinstance(part.get("layers"), Mapping):
            values: dict[str, dict[str, float | None]] = {}
            for layer, value in part["layers"].items():
                given = value if isinstance(value, Mapping) else {str(part.get("distance") or name): value}
                values[str(layer)] = {str(setting): _number(number) for setting, number in given.items()}
            title = "sensitivity of the layers" if "distance" in part else name.replace("_", " ")
            return _titled(title, values, details.get("kept"))
    return None


def _titled(title: str, values: dict[str, dict[str, float | None]], kept: Any = None) -> dict[str, Any] | None:
    known = {layer: settings for layer, settings in values.items() if any(v is not None for v in settings.values())}
    if not known:
        return None
    return {"title": title, "kept": [str(layer) for layer in kept or ()], "layers": known}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
