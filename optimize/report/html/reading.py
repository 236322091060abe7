"""A run as a page wants it: `run.json` and its sidecars, and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from optimize.report.html.words import SETTING

TIMES = ("latency", "prefill", "decode")
_LOWER = {"perplexity", "pseudo_perplexity", "size", "peak_memory", *TIMES}
"""Of which less is better, where a run.json is too old to say."""


@dataclass(frozen=True)
class Result:
    """A run.json with ways to ask it, and where its sidecars lie (None: there are none)."""

    document: Mapping[str, Any]
    folder: Path | None = None
    unreadable: list[str] = field(default_factory=list)
    """Sidecars that are named and can't be read; the page says so."""

    @property
    def artifacts(self) -> list[Mapping[str, Any]]:
        return list(self.document["artifacts"])

    @cached_property
    def names(self) -> list[str]:
        return [one["name"] for one in self.artifacts]

    def artifact(self, name: str) -> Mapping[str, Any]:
        return self.artifacts[self.names.index(name)]

    @cached_property
    def baseline(self) -> str | None:
        """The name of what the others are held against."""
        over = [one["over"] for one in self.document["comparisons"] if one["over"]]
        found = [one["name"] for one in self.artifacts if one["digest"] == self.document["baseline"]]
        return next((name for name in found if name in over), found[0] if found else None)

    def parent(self, name: str) -> str | None:
        """The artifact of this run that another was made from."""
        wanted = self.artifact(name)["parent"]
        found = [one["name"] for one in self.artifacts if one["digest"] == wanted and one["name"] != name]
        return found[0] if wanted and found else None

    @cached_property
    def qualities(self) -> list[str]:
        """The task's own metrics."""
        named = [
            metric
            for one in self.artifacts
            for metric, value in one["scores"].items()
            if isinstance(value, Mapping) and "value" in value
        ]
        return list(dict.fromkeys(named))

    @cached_property
    def times(self) -> list[tuple[str, str]]:
        """(metric, setting) of every time that was measured."""
        return list(dict.fromkeys(key for one in self.artifacts for key in latencies(one)))

    def higher_is_better(self, metric: str) -> bool:
        told = (self.document.get("metrics") or {}).get(metric) or {}
        return bool(told.get("higher_is_better", metric not in _LOWER))

    def quality(self, name: str, metric: str) -> float | None:
        score = self.artifact(name)["scores"].get(metric) or {}
        return score.get("value")

    def milliseconds(self, name: str, metric: str, setting: str) -> float | None:
        """The median call."""
        score = latencies(self.artifact(name)).get((metric, setting))
        return score["p50_ms"] if score else None

    def compared(
        self, name: str, over: str | None, metric: str, setting: str | None = None
    ) -> Mapping[str, Any] | None:
        """One artifact against another, with the interval; turned round where only that was measured."""
        for one in self.document["comparisons"]:
            if (one["metric"], one["setting"]) != (metric, setting):
                continue
            if (one["artifact"], one["over"]) == (name, over):
                return one  # type: ignore[no-any-return]
            if (one["artifact"], one["over"]) == (over, name):
                return _turned(one)
        return None

    def sidecar(self, name: str) -> Any:
        """A JSON sidecar; None where there is none, or where it can't be read."""
        entry = self.document["sidecars"].get(name)
        if entry is None or self.folder is None:
            return None
        # A name alone: a run.json from elsewhere says no path.
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / Path(entry["path"]).name).read_bytes())
        if name not in self.unreadable:
            self.unreadable.append(name)
        return None


def latencies(artifact: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(metric, setting) -> its entry of `scores.latency`."""
    found = {}
    for score in artifact["scores"].get("latency") or []:
        label = ",".join(f"{name}={score[name]}" for name in SETTING if name in score)
        found[score.get("phase", "latency"), label] = score
    return found


def _turned(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same comparison, seen from the other side."""

    def of(value: float | None) -> float | None:
        if value is None:
            return None
        return -value if comparison["unit"] == "difference" else 1 / value if value else None

    low, high = comparison["ci"]
    return {
        **comparison,
        "artifact": comparison["over"],
        "over": comparison["artifact"],
        "estimate": of(comparison["estimate"]),
        "ci": [of(high), of(low)],
        "details": {},
    }
