"""Progress in a notebook: one output that changes in place while the work goes on, and is one line in the end.

Nothing but IPython's display is needed, so that the line stays in the saved file and wherever that is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optimize.commands.reporting import plain
from optimize.notebook.shown import Bundle, safe
from optimize.progress import Progress
from optimize.terminal import duration

SECONDS_BETWEEN = 0.25
"""Between two drawings of the same stage: a notebook's front end is asked no more often."""


@dataclass
class _Row:
    began: float
    text: str = ""
    state: str = "running"
    detail: str = ""
    share: float | None = None
    seconds: float = 0.0


class Live(Progress):
    """A table of stages that `show` is given again and again; the first time with `update=False`."""

    def __init__(
        self, show: Callable[[Bundle, bool], object] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._show = show or _Display()
        self._clock = clock
        self._began = self._drawn = clock()
        self._rows: dict[str, _Row] = {}
        self._warnings: list[str] = []
        self._is_there = False

    def start(self, name: str, text: str = "") -> None:
        self._rows[name] = _Row(self._clock(), "" if text == name else text)
        self._draw()

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        row = self._rows.setdefault(name, _Row(self._clock()))
        row.share, row.detail = (done / total if total else None), text
        if self._clock() - self._drawn >= SECONDS_BETWEEN:
            self._draw()

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        row = self._rows.setdefault(name, _Row(self._clock()))
        row.state, row.seconds, row.detail = "reused" if cached else "done", seconds, text
        self._draw()

    def fail(self, name: str, text: str = "") -> None:
        row = self._rows.setdefault(name, _Row(self._clock()))
        row.state, row.seconds, row.detail = "failed", self._clock() - row.began, text
        self._draw()

    def warn(self, name: str, message: str) -> None:
        warning = f"{name}: {message}" if name else message
        if warning not in self._warnings:
            self._warnings.append(warning)

    def end(self, said: str) -> None:
        """What is left of it: one line, and below it what was warned of."""
        told = ", ".join(
            name
            + (" reused" if row.state == "reused" else f" {row.state}" if row.state != "done" else "")
            + ("" if row.state == "reused" else f" {duration(row.seconds)}")
            for name, row in self._rows.items()
        )
        line = f"{said} in {duration(self._clock() - self._began)}" + (f" ({told})" if told else "")
        warnings = [f"warning: {warning}" for warning in self._warnings]
        html = f"<div>{safe(line)}</div>" + "".join(
            f"<div><small>{safe(warning)}</small></div>" for warning in warnings
        )
        self._send({"text/plain": "\n".join(plain(text) for text in (line, *warnings)), "text/html": html})

    def _draw(self) -> None:
        self._drawn = self._clock()
        cells = [self._cells(name, row) for name, row in self._rows.items()]
        html = "".join(
            f"<tr><td>{mark}</td><td><b>{safe(name)}</b></td><td>{safe(row.text)}</td><td>{bar}</td>"
            f"<td>{safe(seconds)}</td><td>{safe(row.detail)}</td></tr>"
            for (name, row), (mark, bar, seconds) in zip(self._rows.items(), cells, strict=True)
        )
        name, row = next(reversed(self._rows.items()))
        share = "" if row.share is None else f" {row.share:.0%}"
        text = plain(f"{name}: {row.state}{share} {row.detail}".rstrip())
        self._send({"text/plain": text, "text/html": f"<table>{html}</table>"})

    def _cells(self, name: str, row: _Row) -> tuple[str, str, str]:
        if row.state == "running":
            value = "" if row.share is None else f' value="{row.share:.3f}"'
            return "…", f"<progress{value}></progress>", duration(self._clock() - row.began)
        mark = "✗" if row.state == "failed" else "✓"
        return mark, row.state, "" if row.state == "reused" else duration(row.seconds)

    def _send(self, bundle: Bundle) -> None:
        self._show(bundle, self._is_there)
        self._is_there = True


class _Display:
    """One output of the cell that runs now."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, bundle: Mapping[str, str], update: bool) -> None:
        from IPython import display

        show: Any = display.display
        if update:
            self._handle.update(bundle, raw=True)
        else:
            self._handle = show(bundle, raw=True, display_id=True)
