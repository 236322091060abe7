"""What works with what: every task with every format and every way to quantise, read off the registry.

    python -m optimize.support README.md

writes two tables between the markers of that file: every method, and this. `tests/test_support.py` runs every cell of
it; what a stage refuses (`Entry.refuses`) is no cell, and `optimize validate` says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from optimize import runtimes, stages, tasks
from optimize.stages import Entry

BEGIN, END = "<!-- support -->", "<!-- /support -->"
METHODS_BEGIN, METHODS_END = "<!-- methods -->", "<!-- /methods -->"
FORMATS = tuple(runtimes.RUNTIMES)


@dataclass(frozen=True)
class Cell:
    """A stage for a task's models, in one of its modes where it has several."""

    task: str
    entry: Entry
    format: str
    """Of what the stage takes."""
    mode: str | None

    def __str__(self) -> str:
        entry = self.entry
        return " ".join(filter(None, (self.task, self.format, entry.verb, entry.method, entry.backend, self.mode)))


def modes(entry: Entry) -> tuple[str | None, ...]:
    """The values that the method's `mode` may have."""
    field = entry.load().Config.model_fields.get("mode")
    return get_args(field.annotation) if field else (None,)


def sources(task: str) -> tuple[str, ...]:
    """The formats that models of a task may come in."""
    return ("transformers", "pytorch") if tasks.get(task).plain_modules else ("transformers",)


def cells(task: str) -> Iterator[Cell]:
    """Every export and every quantisation for a task, of each format that its models reach."""
    reached = set(sources(task))
    entries = [entry for entry in stages.entries() if entry.verb in ("export", "quantize")]
    for entry in sorted(entries, key=lambda entry: entry.verb):
        given = [format for format in entry.takes if format in reached]
        if task in entry.refuses or not given:
            continue
        reached.add(entry.gives)
        if "onnx" in given:  # the way from any other format leads through it
            given = ["onnx"]
        allowed = [mode for mode in modes(entry) if f"{task} {mode}" not in entry.refuses]
        yield from (Cell(task, entry, format, mode) for format in given for mode in allowed)


def methods() -> str:
    """Markdown: a line for each method's module, with the formats it takes and gives."""
    served: dict[str, list[Entry]] = {}
    for entry in stages.entries():
        if entry.module.startswith("optimize."):
            served.setdefault(entry.module, []).append(entry)
    lines = [["stage", "what it does", "takes", "gives"], ["---"] * 4]
    for first, *others in sorted(served.values(), key=lambda found: stages.VERBS.index(found[0].verb)):
        backend = f" ({first.backend})" if first.backend else ""
        takes = dict.fromkeys(format for entry in (first, *others) for format in entry.takes)
        gives = "the same" if others else first.gives
        lines.append([f"`{first.verb}: {first.method}`{backend}", first.summary, ", ".join(takes), gives])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table() -> str:
    """Markdown: a line for each task, a column for each format."""
    lines = [["task", *(f"`{format}`" for format in FORMATS)], ["---"] * (len(FORMATS) + 1)]
    for task in tasks.TASKS:
        known = list(cells(task))
        reached = {*sources(task), *(cell.entry.gives for cell in known)}
        lines.append([task, *(_ways(format, known) if format in reached else "" for format in FORMATS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ways(format: str, known: list[Cell]) -> str:
    """How models of a format can be quantised: `int8` (dynamic, static), `int4`."""
    ways: dict[str, list[Cell]] = {}
    for cell in known:
        if cell.entry.verb == "quantize" and cell.entry.gives == format:
            ways.setdefault(cell.entry.method, []).append(cell)
    told = ["float"]
    for method, found in ways.items():
        backends = {cell.entry.backend for cell in found}
        several = len(backends) > 1 and None not in backends
        words = [(_backend(cell.entry) if several else cell.mode) or "" for cell in found]
        told.append(f"{method} ({', '.join(filter(None, words))})" if any(words) else method)
    return ", ".join(told)


def _backend(entry: Entry) -> str:
    return " ".join(filter(None, (entry.backend, entry.mode)))


def write(path: Path) -> None:
    """Put the tables between the markers of a file."""
    text = path.read_text(encoding="utf-8")
    for begin, end, drawn in ((METHODS_BEGIN, METHODS_END, methods()), (BEGIN, END, table())):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{drawn}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
