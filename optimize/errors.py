"""The one error family.

OptimizeError                      exit code 4
├── RecipeError                    exit code 2: anything `validate` can see, or a wrong command line
├── SourceError                    a model or data set could not be had
├── StageError                     a stage could not do its work
├── EvaluationError                an artifact could not be measured
├── StoreError                     stored bytes are damaged or a reference names nothing
├── RemoteError                    a remote can't be reached, or holds what it should not
├── HistoryError                   the database of runs can't be read or written
├── TrackingError                  a run could not be sent to a tracker
└── RegistryError                  the registry is damaged or can't be written
    └── PromotionRefused           exit code 1

A message says what went wrong; `stage` and `location` say where; `hint` says what to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class OptimizeError(Exception):
    """Base of every error that is raised on purpose."""

    exit_code = 4

    def __init__(
        self, message: str, *, stage: str | None = None, location: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.location = location
        self.hint = hint

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.location, self.stage) if part)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text}\n  try: {self.hint}" if self.hint else text

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: a message, as a terminal does."""
        from optimize.commands.reporting import plain

        return [f"{type(self).__name__}: {plain(self)}"]


@dataclass(frozen=True)
class Diagnostic:
    """One mistake in a recipe, with its place in the text.

    Lines and columns count from 1; line 0 means that it stands in no text, and `file` says where it came from
    (`--set stages.1.epochs=2`, `<recipe>`).
    """

    message: str
    path: str = ""
    hint: str | None = None
    file: str = ""
    line: int = 1
    column: int = 1
    source_line: str = ""

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class RecipeError(OptimizeError):
    """A recipe or a command line that can't be right. Holds every mistake found, not only the first."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        diagnostics: Sequence[Diagnostic] = (),
        stage: str | None = None,
        location: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, stage=stage, location=location, hint=hint)
        self.diagnostics = tuple(diagnostics)


class SourceError(OptimizeError):
    """A model or data set could not be found, fetched, verified or understood."""


class StageError(OptimizeError):
    """A stage could not turn its input into an artifact."""


class EvaluationError(OptimizeError):
    """An artifact could not be scored."""


class StoreError(OptimizeError):
    """A stored artifact is damaged, or a reference names nothing in the store."""


class RemoteError(OptimizeError):
    """The remote of the store can't be reached, or what lies there is not what was asked for."""


class HistoryError(OptimizeError):
    """The database of runs can't be read or written."""


class TrackingError(OptimizeError):
    """A run could not be sent to a tracker."""


class RegistryError(OptimizeError):
    """The registry is damaged or could not be written."""


class PromotionRefused(RegistryError):
    """A promotion without a passing verdict on that very digest."""

    exit_code = 1
