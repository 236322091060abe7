"""Plans, artifacts and models as a notebook shows them: text, and HTML in which every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from optimize.commands.reporting import plain
from optimize.report.table import megabytes

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.planning import Plan

Bundle = dict[str, str]


def bundle(text: str, html: str) -> Bundle:
    """What `_repr_mimebundle_` returns."""
    return {"text/plain": text, "text/html": html}


def html_table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """The first cell of a row is its title."""
    top = "".join(f"<th>{safe(title)}</th>" for title in head)
    body = "".join(
        f'<tr><th style="text-align:left">{safe(first)}</th>'
        + "".join(f'<td style="text-align:left">{safe(cell)}</td>' for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def safe(text: object) -> str:
    return escape(plain(text))


def text_table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Columns as wide as they have to be."""
    lines = [[plain(cell) for cell in row] for row in ([head] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def plan(planned: Plan) -> Bundle:
    from optimize.terminal import duration

    head = ("name", "stage", "", "why", "time", "disk")
    rows = []
    for step in planned.steps:
        runs = step.status == "RUN"
        seconds = duration(step.expected_seconds) if runs and step.expected_seconds is not None else ""
        size = megabytes(step.expected_bytes) if runs and step.expected_bytes is not None else ""
        rows.append((step.name, "" if step.id == step.name else step.id, step.status, step.why, seconds, size))
    return bundle(text_table(rows, head), html_table(rows, head))


def artifact(shown: Artifact, name: str | None = None, scores: Mapping[str, Any] | None = None) -> Bundle:
    """What it is; the largest files; numbers of the manifest that are no tables; scores where they are known."""
    rows: list[tuple[str, str]] = [("name", name)] if name else []
    rows += [("task", str(shown.task["name"])), ("format", shown.format), ("size", megabytes(shown.size_bytes))]
    largest = sorted(shown.files.items(), key=lambda item: (-item[1]["size"], item[0]))
    told = ", ".join(f"{path} ({megabytes(entry['size'])})" for path, entry in largest[:3])
    rows.append(("files", told + (f" and {len(largest) - 3} more" if len(largest) > 3 else "")))
    simple = {key: value for key, value in shown.details.items() if isinstance(value, str | int | float)}
    if simple:
        rows.append(("details", ", ".join(f"{key}: {value}" for key, value in simple.items())))
    for metric, score in (scores or {}).items():
        if isinstance(score, Mapping) and score.get("value") is not None:
            low, high = ("?" if end is None else f"{end:.4f}" for end in score["ci"])
            rows.append((metric, f"{score['value']:.4f} [{low}, {high}]"))
    rows.append(("digest", shown.digest[:19]))
    return bundle(text_table(rows), html_table(rows))
