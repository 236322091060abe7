"""The result of a run as one table and one line, from `run.json` alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optimize.run import verdict_on

HEADERS = ("artifact", "quality", "p50", "speed-up", "size", "verdict")
_MARKS = {"pass": "pass", "fail": "FAIL", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class Table:
    """Shows itself as text and, in a notebook, as HTML."""

    document: Mapping[str, Any]

    def rows(self) -> list[tuple[str, ...]]:
        """One row an artifact, in the order of `HEADERS`; a cell may hold several lines (one a metric or setting)."""
        return [
            (
                artifact["name"],
                "\n".join(_quality(self.document, artifact)),
                "\n".join(_latency(artifact)),
                "\n".join(_speed_up(self.document, artifact)),
                "\n".join(_size(self.document, artifact)),
                verdict_of(self.document, artifact["name"]),
            )
            for artifact in self.document["artifacts"]
        ]

    def __str__(self) -> str:
        import io

        from rich.console import Console

        from optimize.terminal import result_table

        text = io.StringIO()
        # In a notebook rich would draw beside the file it is given.
        Console(file=text, width=120, color_system=None, force_jupyter=False).print(result_table(self.document))
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell).replace(chr(10), '<br>')}</td>" for cell in row) + "</tr>"
            for row in self.rows()
        )
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(summary(self.document))}</p>"
        )


def summary(document: Mapping[str, Any]) -> str:
    """One line: what was decided and why."""
    if document["error"]:
        error = document["error"]
        where = f" in stage {error['stage']}" if error.get("stage") else ""
        return f"ERROR{where}: {error['message']}"
    verdict = document["verdict"]
    if verdict is None:
        return "No gate was asked, so there is no verdict and nothing is promoted."
    gates = _deciding(document)
    if verdict == "pass":
        said = f"PASS: {_count(len(gates), 'gate check')} held; closest: {_gate(min(gates, key=_closeness))}"
        promoted = document["promoted"]
        if promoted:
            said += f"; promoted to {document['recipe']}@{promoted['alias']} as version {promoted['version']}"
        elif unjudged := _selected_unjudged(document):
            said += f"; nothing was promoted, since no gate judges {unjudged}"
        return said + "."
    deciding = [gate for gate in gates if gate["verdict"] == verdict]
    others = f" (and {len(deciding) - 1} more)" if len(deciding) > 1 else ""
    worst = max(deciding, key=_closeness) if verdict == "fail" else deciding[0]
    return f"{verdict.upper()}: {worst['artifact']}: {worst['reason']}{others}; nothing was promoted."


def verdict_of(document: Mapping[str, Any], name: str) -> str:
    """The verdict on one artifact, or empty where no gate judged it."""
    verdict = verdict_on(document, name)
    return _MARKS[verdict] if verdict else ""


def _deciding(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The gates that the run's verdict is of: where one of several leaves was selected, its confirmation speaks."""
    confirmation = document.get("confirmation")
    if not confirmation:
        return list(document["gates"])
    others = (gate for gate in document["gates"] if gate["artifact"] not in confirmation["among"])
    return [*others, *confirmation["gates"]]


def _selected_unjudged(document: Mapping[str, Any]) -> str | None:
    names = [one["name"] for one in document["artifacts"] if one["digest"] == document["selected"]]
    return names[-1] if names and not any(verdict_on(document, name) for name in names) else None


def _quality(document: Mapping[str, Any], artifact: Mapping[str, Any]) -> Iterable[str]:
    for metric, score in artifact["scores"].items():
        if not isinstance(score, Mapping) or "value" not in score:
            continue
        line = f"{metric} {_shown(score['value'], '.4f')}"
        for comparison in _over_baseline(document, artifact, metric):
            line += f" {_with_interval(comparison, '+.4f')}"
        yield line


def _latency(artifact: Mapping[str, Any]) -> Iterable[str]:
    for setting in artifact["scores"].get("latency", []):
        yield f"b{setting['batch_size']}: {setting['p50_ms']:.2f} ms"


def _speed_up(document: Mapping[str, Any], artifact: Mapping[str, Any]) -> Iterable[str]:
    for comparison in _over_baseline(document, artifact, "latency"):
        yield _with_interval(comparison, ".2f", "x")


def _size(document: Mapping[str, Any], artifact: Mapping[str, Any]) -> Iterable[str]:
    yield f"{artifact['size_bytes'] / 1e6:.1f} MB"
    for comparison in _over_baseline(document, artifact, "size"):
        yield f"{comparison['estimate']:.2f} of baseline"


def _over_baseline(
    document: Mapping[str, Any], artifact: Mapping[str, Any], metric: str
) -> Iterable[Mapping[str, Any]]:
    baselines = {other["name"] for other in document["artifacts"] if other["digest"] == document["baseline"]}
    return (
        comparison
        for comparison in document["comparisons"]
        if comparison["artifact"] == artifact["name"]
        and comparison["metric"] == metric
        and comparison["over"] in baselines
    )


def _with_interval(comparison: Mapping[str, Any], form: str, unit: str = "") -> str:
    low, high = (_shown(end, form) for end in comparison["ci"])
    return f"{_shown(comparison['estimate'], form)}{unit} [{low}, {high}]"


def _shown(value: float | None, form: str) -> str:
    """What is no finite number is null in run.json."""
    return "?" if value is None else format(value, form)


def _gate(gate: Mapping[str, Any]) -> str:
    return f"{gate['artifact']}: {gate['reason']}"


def _closeness(gate: Mapping[str, Any]) -> float:
    """How near the estimate is to the limit, relative to the limit's size."""
    (limit,) = gate["limit"].values()
    if gate["margin"] is None:
        return math.inf
    return float(abs(gate["margin"]) / max(abs(limit), 1e-9))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
