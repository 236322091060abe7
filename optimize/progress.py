"""How work in progress is told: the engine and stages speak to this, a terminal or a log listens."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from optimize.run import Run

P = ParamSpec("P")


class Progress:
    """A listener that says nothing; `optimize.terminal` has the ones that people see."""

    def start(self, name: str, text: str = "") -> None:
        """A stage (by its name) or a step such as `scores` begins."""

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        """`done` of `total` units are finished."""

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        """It ended well; `cached` where nothing was computed."""

    def fail(self, name: str, text: str = "") -> None:
        """It ended badly."""

    def warn(self, name: str, message: str) -> None:
        """Something a person should know, that does not stop the work."""


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this. Imports nothing."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def shown_in_notebooks(work: Callable[P, Run]) -> Callable[P, Run]:
    """A function with an argument `progress`: without one, a notebook shows its progress, and one line in the end."""

    @functools.wraps(work)
    def shown(*args: P.args, **named: P.kwargs) -> Run:
        if named.get("progress") is not None or not in_notebook():
            return work(*args, **named)
        from optimize.notebook.live import Live

        _import_bars_quietly()
        live = Live()
        named["progress"] = live
        try:
            run = work(*args, **named)
        except BaseException as error:
            live.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        live.end(f"{run.document['recipe']}: {run.verdict or 'done'}")
        return run

    return shown


def _import_bars_quietly() -> None:
    """tqdm, which libraries draw with, asks for widgets when it is imported in a notebook; nothing here needs them."""
    import importlib
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        importlib.import_module("tqdm.auto")
