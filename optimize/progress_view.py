"""The progress of a run as people see it, on standard error: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from optimize.commands.reporting import plain
from optimize.progress import Progress
from optimize.terminal import console, duration, safe

SECONDS_BETWEEN_LINES = 15.0
"""How often a stage that goes on and on says so where there is no terminal."""


@contextmanager
def listening() -> Iterator[Progress]:
    """Progress on standard error: a live view on a terminal, plain lines elsewhere."""
    screen = console(stderr=True)
    if not screen.is_terminal or screen.is_dumb_terminal:
        yield Lines(lambda line: print(plain(line), file=screen.file, flush=True))
        return
    view = View()
    with Live(view, console=screen, refresh_per_second=8) as live:
        view.say = live.console.print
        try:
            yield view
        finally:
            view.stop()


class Lines(Progress):
    """One line when a stage begins, one when it ends, and one now and then in between."""

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._began: dict[str, float] = {}
        self._spoke: dict[str, float] = {}

    def start(self, name: str, text: str = "") -> None:
        self._began[name] = self._spoke[name] = self._clock()
        self._write(f"{name}: {text or 'started'}" if text != name else f"{name}: started")

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        now = self._clock()
        if now - self._spoke.get(name, now) < SECONDS_BETWEEN_LINES:
            self._spoke.setdefault(name, now)
            return
        self._spoke[name] = now
        share = f"{done / total:.0%}" if total else ""
        left = _left(now - self._began.get(name, now), done, total, text)
        self._write(f"{name}: {', '.join(part for part in (share, text, left) if part)}")

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        said = "reused" if cached else f"done in {duration(seconds)}"
        self._write(f"{name}: {said}" + (f" ({text})" if text else ""))

    def fail(self, name: str, text: str = "") -> None:
        self._write(f"{name}: failed" + (f": {text}" if text else ""))

    def warn(self, name: str, message: str) -> None:
        self._write(f"{name}: warning: {message}" if name else f"warning: {message}")


@dataclass
class _Row:
    """One stage in the live view."""

    text: str
    began: float
    state: str = "running"
    detail: str = ""
    done: float = 0
    total: float = 0
    seconds: float = 0.0
    spinner: Spinner = field(default_factory=lambda: Spinner("dots"))


class View(Progress):
    """A line for each stage; `rich.live.Live` draws it again and again, and the last drawing stays."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self.say: Callable[[Text], object] = lambda text: None

    def start(self, name: str, text: str = "") -> None:
        self._rows[name] = _Row("" if text == name else text, self._clock())

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        row = self._row(name)
        row.done, row.total, row.detail = done, total, text

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        row = self._row(name)
        row.state, row.detail, row.seconds = "reused" if cached else "done", text, seconds

    def fail(self, name: str, text: str = "") -> None:
        row = self._row(name)
        row.state, row.detail, row.seconds = "failed", text, self._clock() - row.began

    def warn(self, name: str, message: str) -> None:
        self.say(safe(f"warning: {name}: {message}" if name else f"warning: {message}", "yellow"))

    def stop(self) -> None:
        """Nothing goes on any more: what was still running is shown as stopped."""
        for row in self._rows.values():
            if row.state == "running":
                row.state, row.seconds = "stopped", self._clock() - row.began

    def _row(self, name: str) -> _Row:
        if name not in self._rows:
            self.start(name)
        return self._rows[name]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < 100
        grid = Table.grid(
            Column(width=1),
            Column(no_wrap=True, max_width=24),
            Column(no_wrap=True, max_width=0 if narrow else 20, style="dim"),
            Column(no_wrap=True, width=16),
            Column(no_wrap=True, justify="right", min_width=8),
            Column(no_wrap=True, overflow="ellipsis", style="dim"),
            padding=(0, 1),
        )
        for name, row in list(self._rows.items()):  # drawn in a thread of its own, while stages begin
            mark, middle, time_ = self._cells(row, options.ascii_only)
            grid.add_row(mark, safe(name), safe(row.text), middle, time_, safe(self._remark(row)))
        yield grid

    def _cells(self, row: _Row, ascii_only: bool) -> tuple[RenderableType, RenderableType, Text]:
        if row.state == "running":
            bar = ProgressBar(row.total or None, row.done, width=16, pulse=not row.total)
            mark: RenderableType = Text("*") if ascii_only else row.spinner
            return mark, bar, Text(duration(self._clock() - row.began), "cyan")
        good = row.state in ("done", "reused")
        mark = Text(("+" if ascii_only else "✓") if good else ("x" if ascii_only else "✗"), "green" if good else "red")
        took = "" if row.state == "reused" else duration(row.seconds)
        return mark, Text(row.state, {"reused": "dim", "done": "green"}.get(row.state, "red")), Text(took)

    def _remark(self, row: _Row) -> str:
        left = _left(self._clock() - row.began, row.done, row.total, row.detail) if row.state == "running" else ""
        return ", ".join(part for part in (left, row.detail) if part)


def _left(elapsed: float, done: float, total: float, text: str) -> str:
    """An estimate of the time left, once a tenth is done, where the text gives none of its own."""
    if not total or not total > done >= total / 10 or text.endswith(" left"):
        return ""
    return f"about {duration(elapsed / done * (total - done))} left"
