"""A `run.json` as rows of the history's tables; no database is needed for that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from optimize.artifact import digest_of
from optimize.report.quantities import quantities

Rows = dict[str, list[dict[str, Any]]]
"""Table -> rows, in the order in which they can be inserted."""
TABLES = ("optimize_runs", "optimize_artifacts", "optimize_scores", "optimize_comparisons", "optimize_gates")
"""In a database that others use too, the prefix keeps them apart (MLflow has a table `runs` as well)."""
SCHEMA = 1
"""Raised when a table changes; a database of an older one is filled anew."""
_STAMP = re.compile(r"(\d{8}-\d{6}-\d{6})-")


def rows_of(document: Mapping[str, Any]) -> Rows:
    """Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` where it is no `run.json` of schema 1."""
    run = _text(document["run"])
    return dict(
        zip(
            TABLES,
            (
                [_run(document)],
                [_artifact(run, number, one) for number, one in enumerate(document["artifacts"])],
                _scores(run, document),
                [_comparison(run, number, one) for number, one in enumerate(document["comparisons"])],
                _gates(run, document),
            ),
            strict=True,
        )
    )


def started(run: str) -> datetime | None:
    """When a run began (UTC), which its id says; None for an id that somebody else chose."""
    found = _STAMP.match(run)
    if found is None:
        return None
    return datetime.strptime(found[1], "%Y%m%d-%H%M%S-%f").replace(tzinfo=timezone.utc)


def fingerprint_of(host: Mapping[str, Any]) -> str:
    """Of the host as scores know it: two runs whose fingerprints differ were timed on different machines, or with
    different libraries. As there, the memory is left out: what the system keeps of it differs from start to start."""
    return digest_of({name: fact for name, fact in host.items() if name != "memory_bytes"})[7:19]


def _run(document: Mapping[str, Any]) -> dict[str, Any]:
    error, promoted, host = document["error"] or {}, document.get("promoted") or {}, document["host"]
    return {
        "run": _text(document["run"]),
        "started": started(str(document["run"])),
        "kind": "compare" if "compared" in document else "gate" if document.get("against") else "apply",
        "recipe": _text(document["recipe"]),
        "recipe_digest": document["recipe_digest"],
        "verdict": document["verdict"],
        "exit_code": document["exit_code"],
        "error": _text(error.get("message")),
        "error_stage": _text(error.get("stage")),
        "seconds": document["seconds"],
        "host": fingerprint_of(host),
        "host_name": _text(f"{host['cpu']['model']}, {host['cpu']['cores']} cores"),
        "baseline": document["baseline"],
        "alias": _text(promoted.get("alias")),
        "version": promoted.get("version"),
        "document": _clean(document),
    }


def _artifact(run: str | None, number: int, one: Mapping[str, Any]) -> dict[str, Any]:
    text = ("digest", "key", "name", "stage", "parent", "format")
    numbers = ("cached", "seconds", "size_bytes", "bits_per_weight")
    return {
        "run": run,
        "number": number,
        **{name: _text(one[name]) for name in text},
        **{name: one[name] for name in numbers},
    }


def _scores(run: str | None, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = {one["name"]: one["stage"] for one in document["artifacts"]}
    return [
        {
            "run": run,
            "number": number,
            "artifact": _text(one.artifact),
            "stage": _text(stages[one.artifact]),
            "metric": _text(one.metric),
            "setting": _text(one.setting),
            "value": float(one.value),
            "low": one.low,
            "high": one.high,
            "unit": one.unit,
            "n": one.n,
        }
        for number, one in enumerate(quantities(document))
    ]


def _comparison(run: str | None, number: int, one: Mapping[str, Any]) -> dict[str, Any]:
    low, high = one["ci"]
    names = {name: _text(one[name]) for name in ("artifact", "over", "metric", "setting", "unit")}
    return {"run": run, "number": number, **names, "estimate": one["estimate"], "low": low, "high": high, "n": one["n"]}


def _gates(run: str | None, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    confirmed = document.get("confirmation", {}).get("gates", ())
    judged = [(one, False) for one in document["gates"]] + [(one, True) for one in confirmed]
    return [_gate(run, number, one, again) for number, (one, again) in enumerate(judged)]


def _gate(run: str | None, number: int, one: Mapping[str, Any], confirmation: bool) -> dict[str, Any]:
    ((limit, bound),) = one["limit"].items()
    low, high = one["ci"]
    return {
        "run": run,
        "number": number,
        **{name: _text(one[name]) for name in ("artifact", "over", "metric", "setting", "verdict", "reason")},
        "limit_name": limit,
        "limit_value": bound,
        "estimate": one["estimate"],
        "low": low,
        "high": high,
        "margin": one["margin"],
        "acknowledged": bool(one.get("acknowledged")),
        "confirmation": confirmation,
    }


def _text(value: Any) -> str | None:
    """Text that every database takes: PostgreSQL has no NUL, and no lone surrogates."""
    if value is None:
        return None
    return str(value).replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_text(key): _clean(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return _text(value) if isinstance(value, str) else value
