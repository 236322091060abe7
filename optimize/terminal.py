"""What people see on a terminal: the plan, the table of a result, what the work folder keeps.

Names and messages come from recipes, data and libraries: everything passes through `plain` and becomes rich `Text`,
which knows no markup, so that nothing of it can command the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from optimize.commands.reporting import plain
from optimize.report import table as report
from optimize.report.table import megabytes

if TYPE_CHECKING:
    from optimize.planning import Plan
    from optimize.registry import Version
    from optimize.store import Stored

_STYLES = {"pass": "green", "FAIL": "bold red", "inconclusive": "yellow", "baseline": "dim"}


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as it is. Colour needs a terminal and no NO_COLOR; a log is 120 columns wide."""
    # The stream of now: while a library is silenced, `sys.stderr` is another, and the view of a run goes on.
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 120
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def safe(text: object, style: str = "") -> Text:
    return Text(plain(text), style=style)


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `2:05`, `1:02:05`: as exact as people want it."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan_table(plan: Plan) -> Table:
    """One row a stage: run or reused, why, and what it took the last time."""
    table = plain_table("name", "stage", "", "why")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("disk", justify="right", no_wrap=True)
    for step in plan.steps:
        known = step.status == "RUN"
        seconds = duration(step.expected_seconds) if known and step.expected_seconds is not None else ""
        size = megabytes(step.expected_bytes) if known and step.expected_bytes is not None else ""
        stage = "" if step.id == step.name else step.id
        status = Text(step.status, "yellow" if known else "green")
        table.add_row(safe(step.name), safe(stage), status, safe(step.why), seconds, size)
    return table


# --- the store and the registry ---------------------------------------------------------------------------------------


def store_table(stored: Iterable[Stored]) -> Table:
    table = plain_table("digest", "format", "size", "made by")
    for one in stored:
        makers = dict.fromkeys(f"{record['recipe']}/{record['stage']}" for record in one.records)
        artifact = one.artifact
        table.add_row(
            artifact.digest[:19], safe(artifact.format), megabytes(artifact.size_bytes), safe(", ".join(makers))
        )
    return table


def version_table(versions: Iterable[Version]) -> Table:
    table = plain_table("version", "digest", "verdict", "promoted", "by", "aliases")
    for one in versions:
        verdict = one.verdict or "none"
        if one.waiver:
            verdict += f", waived until {one.waiver.expires}: {one.waiver.reason}"
        cells = (f"{one.name}@{one.version}", one.digest[:19], verdict, one.when[:16], one.who, ", ".join(one.aliases))
        table.add_row(*map(safe, cells))
    return table


def log_table(entries: Iterable[Mapping[str, Any]]) -> Table:
    table = plain_table("", "when", "who", "what", "verdict")
    for one in entries:
        verdict = f"{one['verdict'] or 'none'}" + (f", waived: {one['waiver']['reason']}" if one.get("waiver") else "")
        what = f"{one['action']} {one['name']}@{one['version']} ({one['digest'][:19]}) to {one['alias']}"
        cells = (one["number"], one["when"][:19], f"{one['who']} on {one['host']}", what, verdict)
        table.add_row(*map(safe, cells))
    return table


# --- the result -------------------------------------------------------------------------------------------------------


def result_table(document: Mapping[str, Any]) -> ResultTable:
    """The table of a run.json: for each artifact its quality, latency and size, what changed against the baseline with
    the interval of that, and the verdict."""
    return ResultTable(report.Table(document))


@dataclass(frozen=True)
class ResultTable:
    """Fits itself to the width: a measurement takes one line, two or three."""

    content: report.Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        roomy = options.update(width=10_000)
        for breaks in (("  ", " "), ("\n", " "), ("\n", "\n")):
            table = self._drawn(*breaks)
            if console.measure(table, options=roomy).maximum <= options.max_width:
                break
        yield table
        for note in self.content.notes:
            yield safe(note, "dim")

    def _drawn(self, first: str, second: str) -> Table:
        """`first` stands between a value and its change, `second` between that and its interval."""

        def text(cell: report.Cell) -> Text:
            detail = second.join(part for part in (cell.change, cell.interval) if part)
            return Text(cell.value) + Text(first + detail if detail else "", "dim")

        artifact, *others = self.content.headers
        table = plain_table(artifact)
        for title in others:
            table.add_column(safe(title), no_wrap=True)
        for name, cells, verdict in self.content.rows():
            table.add_row(safe(name), *map(text, cells), Text(verdict, _STYLES.get(verdict, "")))
        return table


def plain_table(*titles: str) -> Table:
    """A table without frames, whose columns wrap."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table
