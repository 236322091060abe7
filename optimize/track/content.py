"""What trackers are told of a run: drawn from its folder alone, so that an old run can be sent as well."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FILES = ("run.json", "report.html", "recipe.json")
CURVES = "training.jsonl"
"""In a stage's logs: a line for each time that the Trainer told its loss."""
_UNUSUAL = re.compile(r"[^\w./ -]", re.ASCII)


@dataclass(frozen=True)
class Point:
    """One point of a training curve."""

    name: str
    step: int
    value: float


@dataclass(frozen=True)
class Content:
    """A run's folder, as trackers see it. Names of metrics hold only what each of them takes: letters, digits and
    `_ . / -`; what stands before the slash, the artifact, groups them."""

    folder: Path
    document: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Content:
        return cls(folder, json.loads((folder / "run.json").read_bytes()))

    @property
    def run(self) -> str:
        return str(self.document["run"])

    @property
    def recipe_name(self) -> str:
        return str(self.document["recipe"])

    @property
    def failed(self) -> bool:
        """Whether it ended with an error. A gate that fails is a result like another."""
        return self.document["error"] is not None

    @cached_property
    def began_ms(self) -> int:
        """In milliseconds since 1970. The same each time, so that what is sent twice is known to be the same."""
        from optimize.history.rows import started

        found = started(self.run)
        return int(1000 * (found.timestamp() if found else (self.folder / "run.json").stat().st_mtime))

    @property
    def ended_ms(self) -> int:
        return self.began_ms + int(1000 * self.document["seconds"])

    @cached_property
    def parameters(self) -> dict[str, str]:
        """What the recipe says, by path: `stages.int8.mode` -> `dynamic`."""
        try:
            recipe = json.loads((self.folder / "recipe.json").read_bytes())["recipe"]
        except (OSError, ValueError, KeyError):
            return {}
        stages = {str(stage.get("name", number)): stage for number, stage in enumerate(recipe.get("stages", ()))}
        return dict(_leaves({**recipe, "stages": stages, "track": None}, ""))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Scores, comparisons and margins: `int8/accuracy`, with `.low` and `.high` of its interval;
        `int8/latency.batch_size_8.sequence_length_128.threads_1.over_teacher.speedup`."""
        return {name: value for name, value in self._measured() if value is not None}

    @property
    def key_metrics(self) -> list[str]:
        """The few that runs are compared by: each artifact's quality, median times, size and memory."""
        from optimize.report.quantities import quantities

        found = (one for one in quantities(self.document) if "." not in one.metric and one.metric != "bits_per_weight")
        return [_name(one.artifact, one.metric, one.setting) for one in found]

    @cached_property
    def curves(self) -> list[Point]:
        found = []
        for path in sorted((self.folder / "logs").glob(f"*/{CURVES}")):
            for line in path.read_text(encoding="utf-8").splitlines():
                told = json.loads(line)
                found += [
                    Point(_name(path.parent.name, f"training.{name}"), told["step"], value)
                    for name, value in told.items()
                    if name != "step"
                ]
        return found

    @cached_property
    def tags(self) -> dict[str, str]:
        """The verdict and what led to it, as text."""
        from optimize.history.rows import fingerprint_of
        from optimize.report.table import summary

        document, promoted = self.document, self.document.get("promoted")
        told = {
            "verdict": "error" if self.failed else document["verdict"] or "none",
            "summary": summary(document),
            "recipe": self.recipe_name,
            "recipe_digest": document["recipe_digest"],
            "host": f"{fingerprint_of(document['host'])} ({document['host']['cpu']['model']})",
            **({"promoted": f"{promoted['alias']} {promoted['version']}"} if promoted else {}),
        }
        for number, gate in enumerate(document["gates"]):
            told[f"gates.{number}"] = f"{gate['verdict']}: {gate['artifact']}: {gate['reason']}"
        return told

    @cached_property
    def note(self) -> str:
        """What a terminal shows, as Markdown: indented, so that nothing in it is markup."""
        from optimize.report.table import Table, summary

        text = f"{Table(self.document)}\n\n{summary(self.document)}"
        return "\n".join(f"    {line}".rstrip() for line in text.splitlines())

    @property
    def files(self) -> list[Path]:
        return [path for name in FILES if (path := self.folder / name).is_file()]

    def _measured(self) -> Iterator[tuple[str, float | None]]:
        from optimize.report.quantities import quantities

        for one in quantities(self.document):
            yield from _with_interval(_name(one.artifact, one.metric, one.setting), one.value, (one.low, one.high))
        for pair in self.document["comparisons"]:
            name = _name(pair["artifact"], pair["metric"], pair["setting"])
            if pair["over"]:
                name += _name("", f"over_{pair['over']}.{pair['unit']}")
                yield from _with_interval(name, pair["estimate"], pair["ci"])
        for gate in self.document["gates"]:
            (limit,) = gate["limit"]
            yield f"{_name(gate['artifact'], gate['metric'], gate['setting'])}.{limit}.margin", gate["margin"]


def _name(artifact: str, metric: str, setting: str | None = None) -> str:
    parts = [metric, *(setting.replace("=", "_").split(",") if setting else ())]
    return _UNUSUAL.sub("_", f"{artifact}/{'.'.join(parts)}" if artifact else f".{'.'.join(parts)}")


def _with_interval(name: str, value: float | None, ci: Any) -> Iterator[tuple[str, float | None]]:
    low, high = ci or (None, None)
    yield from ((name, value), (f"{name}.low", low), (f"{name}.high", high))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every value below a mapping, by its path; a list is one value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif value is not None and value not in ([], ()):
        yield _UNUSUAL.sub("_", path), value if isinstance(value, str) else json.dumps(value)
