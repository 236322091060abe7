"""The evaluation rows that baseline and others answer differently, as the page lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optimize.report.html.reading import Result
from optimize.report.html.words import number

KINDS = {"lost": "right before, wrong now", "gained": "wrong before, right now", "other": "another answer"}


def changed_rows(result: Result) -> dict[str, Any] | None:
    """{"names", "counts", "kinds", "rows", "left_out"}; None where no rows were kept."""
    sidecar = result.sidecar("rows")
    if not sidecar:
        return None
    names = list(sidecar["counts"])
    rows = [_row(row, names) for row in sidecar["rows"]]
    kinds = {kind: sum(kind in row["kinds"] for row in rows) for kind in KINDS}
    return {
        "baseline": sidecar["baseline"],
        "names": names,
        "counts": sidecar["counts"],
        "kinds": {kind: count for kind, count in kinds.items() if count},
        "words": KINDS,
        "rows": rows,
        "left_out": sidecar["left_out"],
        "labelled": any(row["label"] is not None for row in rows),
    }


def _row(row: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    label = None if row["label"] is None else answer(row["label"])[0]
    before, before_detail = answer(row["baseline"])
    groups: dict[str, dict[str, Any]] = {}
    for name, given in row["answers"].items():
        said, detail = answer(given)
        group = groups.setdefault(said, {"answer": said, "kind": kind_of(label, before, said), "by": []})
        group["by"].append((name, detail))
    return {
        "row": row["row"],
        "columns": [(key, answer(value)[0]) for key, value in row["columns"].items()],
        "label": label,
        "before": before,
        "before_detail": before_detail,
        "right": label is not None and before == label,
        "groups": list(groups.values()),
        "kinds": list(dict.fromkeys(group["kind"] for group in groups.values())),
        "of": [names.index(name) for name in row["answers"] if name in names],
    }


def kind_of(label: str | None, before: str, now: str) -> str:
    """Whether a changed answer lost or gained a row; `other` where neither answer is right, or nobody knows."""
    if label is None or before == now:
        return "other"
    return "lost" if before == label else "gained" if now == label else "other"


def answer(given: Any) -> tuple[str, str]:
    """An answer of any task in words, and what stands beside it: `("negative", "0.83")`."""
    if isinstance(given, Mapping):
        if "label" in given:
            score = given.get("score")
            return str(given["label"]), number(score, 3) if isinstance(score, (int, float)) else ""
        for key in ("text", "answer"):
            if key in given:
                return str(given[key]) or "(nothing)", ""
        return ", ".join(f"{key} {_words(value)}" for key, value in given.items()), ""
    return _words(given), ""


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_words(item) for item in value)
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return "none" if value is None else str(value)
    if isinstance(value, float):
        return number(value)
    return json.dumps(value, ensure_ascii=False)
