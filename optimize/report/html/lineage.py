"""Where the artifacts come from, on what they were measured, and how to run it all again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from optimize.report.html.reading import Result
from optimize.report.html.waterfall import tree
from optimize.report.html.words import number
from optimize.report.table import megabytes
from optimize.run import verdict_on


def lineage(result: Result) -> list[dict[str, Any]]:
    """A row an artifact, each below what it was made from."""
    rows = []
    for name, depth in tree(result):
        one = result.artifact(name)
        notes = ["baseline"] if name == result.baseline else []
        notes += ["selected"] if one["digest"] == result.document.get("selected") else []
        notes += [verdict] if (verdict := verdict_on(result.document, name)) else []
        rows.append(
            {
                "name": name,
                "depth": depth,
                "stage": one["stage"],
                "format": one["format"],
                "size": megabytes(one["size_bytes"]),
                "bits": number(one["bits_per_weight"], 3),
                "seconds": "reused" if one["cached"] else seconds(one["seconds"]),
                "digest": one["digest"].removeprefix("sha256:")[:12],
                "notes": notes,
            }
        )
    return rows


def environment(result: Result) -> list[tuple[str, str]]:
    """(what, which) of the machine and its software."""
    host = result.document["host"]
    cpu = host.get("cpu") or {}
    facts = [
        ("processor", f"{cpu.get('model', '?')}, {cpu.get('cores', '?')} cores"),
        ("instructions", ", ".join(map(str, cpu.get("flags") or ()))),
        ("memory", megabytes(host["memory_bytes"]) if isinstance(host.get("memory_bytes"), int) else ""),
        ("system", str(host.get("os", ""))),
        ("Python", str(host.get("python", ""))),
        *((name, str(version)) for name, version in (host.get("libraries") or {}).items()),
    ]
    return [(what, which) for what, which in facts if which]


def data(result: Result) -> list[tuple[str, str, str]]:
    """(split, rows, digest)."""
    return [
        (split, f"{one['rows']:,}", str(one["digest"]).removeprefix("sha256:")[:12])
        for split, one in result.document["data"].items()
    ]


def measurement(result: Result) -> dict[str, Any] | None:
    """How quiet the machine was."""
    told = result.document["measurement"]
    if not told:
        return None
    signals = [
        (name.replace("_", " "), number(one["median"], 3), number(one["max"], 3), number(one["limit"], 3))
        for name, one in (told.get("signals") or {}).items()
    ]
    return {**told, "signals": signals}


def command(result: Result) -> str | None:
    """What runs it again: the recipe as it was resolved lies beside run.json."""
    compared = result.document.get("compared")
    if isinstance(compared, Mapping):
        return shlex.join(["optimize", "compare", *(str(compared[name]) for name in ("candidate", "baseline"))])
    if result.folder is None or not (result.folder / "recipe.json").exists():
        return None
    # From the folder that holds the work folder, where people stand.
    parts = result.folder.absolute().parts[-3:]
    return shlex.join(["optimize", "apply", str(Path(*parts, "recipe.json"))])


def when(run: str) -> str:
    """`20 November 2026, 20:15 UTC` of a run's id; the id itself where it holds no time."""
    try:
        time = datetime.strptime(run[:15], "%Y%m%d-%H%M%S")
    except ValueError:
        return run
    return f"{time.day} {time:%B %Y}, {time:%H:%M} UTC"


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s"
