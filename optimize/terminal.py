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
from optimize.report.table import verdict_of

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


def megabytes(size: float) -> str:
    """Bytes as people read them: `12.3 kB`, `90.9 MB`, `1.25 GB`."""
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


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


@dataclass(frozen=True)
class _Cell:
    """A measurement, how it compares with the baseline's, and the interval of that."""

    value: str = ""
    change: str = ""
    interval: str = ""

    def joined(self, layout: int) -> Text:
        """All in a line, in two lines or in three: whatever the width allows."""
        first, second = (("  ", " "), ("\n", " "), ("\n", "\n"))[layout]
        detail = second.join(part for part in (self.change, self.interval) if part)
        return Text(self.value) + Text(first + detail if detail else "", "dim")


def result_table(document: Mapping[str, Any]) -> ResultTable:
    """The table of a run.json: for each artifact its quality, latency and size, what changed against the baseline with
    the interval of that, and the verdict."""
    return ResultTable(document)


@dataclass(frozen=True)
class ResultTable:
    """Fits itself to the width: a measurement takes one line, two or three."""

    document: Mapping[str, Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        roomy = options.update(width=10_000)
        for layout in range(3):
            table = self._drawn(layout)
            if console.measure(table, options=roomy).maximum <= options.max_width:
                break
        yield table

    def _drawn(self, layout: int) -> Table:
        artifacts = self.document["artifacts"]
        metrics = list(dict.fromkeys(name for one in artifacts for name in _task_metrics(one)))
        settings = _unique(
            setting for one in artifacts for setting in map(_setting, one["scores"].get("latency") or [])
        )
        table = plain_table("artifact")
        for title in (*metrics, *(_title(setting, settings) for setting in settings), "size"):
            table.add_column(safe(title), no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for one in artifacts:
            cells = [self._quality(one, metric) for metric in metrics]
            cells += [self._latency(one, setting) for setting in settings]
            table.add_row(
                safe(one["name"]), *(cell.joined(layout) for cell in cells), self._size(one, layout), self._verdict(one)
            )
        return table

    def _quality(self, artifact: Mapping[str, Any], metric: str) -> _Cell:
        score = artifact["scores"].get(metric)
        if not score:
            return _Cell()
        compared = self._compared(artifact, metric)
        value = score["value"]
        return _cell("?" if value is None else f"{value:.3f}", compared, "{:+.3f}")

    def _latency(self, artifact: Mapping[str, Any], setting: Mapping[str, Any]) -> _Cell:
        for score in artifact["scores"].get("latency") or []:
            if _setting(score) == setting:
                return _cell(f"{score['p50_ms']:.2f} ms", self._compared(artifact, "latency", setting), "{:.2f}", "x")
        return _Cell()

    def _size(self, artifact: Mapping[str, Any], layout: int) -> Text:
        compared = self._compared(artifact, "size")
        ratio = f"{compared['estimate']:.2f}x" if compared else ""
        return _Cell(megabytes(artifact["size_bytes"]), ratio).joined(layout)

    def _verdict(self, artifact: Mapping[str, Any]) -> Text:
        said = verdict_of(self.document, artifact["name"])
        if not said and artifact["digest"] == self.document["baseline"]:
            said = "baseline"
        return Text(said, _STYLES.get(said, ""))

    def _compared(
        self, artifact: Mapping[str, Any], metric: str, setting: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any] | None:
        """The comparison with the baseline, where there is one."""
        baselines = [a["name"] for a in self.document["artifacts"] if a["digest"] == self.document["baseline"]]
        for one in self.document["comparisons"]:
            same = (one["artifact"], one["metric"]) == (artifact["name"], metric) and one["over"] in baselines
            if same and (setting is None or _parsed(one["setting"]) == setting):
                return one  # type: ignore[no-any-return]
        return None


def plain_table(*titles: str) -> Table:
    """A table without frames, whose columns wrap."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _cell(value: str, compared: Mapping[str, Any] | None, form: str, unit: str = "") -> _Cell:
    if compared is None or compared["estimate"] is None:
        return _Cell(value)
    # An end that too few rounds can't bound is null in run.json.
    low, high = ("?" if end is None else form.format(end) for end in compared["ci"])
    return _Cell(value, form.format(compared["estimate"]) + unit, f"[{low}, {high}]")


def _task_metrics(artifact: Mapping[str, Any]) -> Iterable[str]:
    return (name for name, score in artifact["scores"].items() if isinstance(score, Mapping) and "value" in score)


def _setting(score: Mapping[str, Any]) -> dict[str, str]:
    """What a latency was measured at."""
    return {name: str(score[name]) for name in ("batch_size", "sequence_length", "threads") if name in score}


def _parsed(setting: str | None) -> dict[str, str]:
    """`batch_size=8,threads=1` of a comparison, in the form of `_setting`."""
    return dict(pair.split("=", 1) for pair in (setting or "").split(",") if "=" in pair)


def _unique(settings: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for setting in settings:
        if setting not in found:
            found.append(setting)
    return found


def _title(setting: Mapping[str, str], settings: list[dict[str, str]]) -> str:
    """`p50, batch 8`, and what else tells it from the other settings."""
    others = [f"{name.split('_')[0]} {value}" for name, value in setting.items() if name != "batch_size"]
    crowded = sum(other.get("batch_size") == setting.get("batch_size") for other in settings) > 1
    return ", ".join([f"p50, batch {setting.get('batch_size', '?')}", *(others if crowded else ())])
