"""How work in progress is told: the engine and stages speak to this, a terminal or a log listens."""

from __future__ import annotations


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
