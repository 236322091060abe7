"""What the command line prints: one JSON document or text on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError, RecipeError

INTERRUPTED = 130
UNEXPECTED = 4


class OutputFormat(str, Enum):
    """How the mistakes in a recipe are shown."""

    full = "full"
    concise = "concise"
    json = "json"
    github = "github"


def plain(text: object) -> str:
    """Text from a recipe, a data set or a library, safe to show: no terminal control, no bidirectional tricks."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """`head` and `less` go when they have seen enough: the rest is dropped, and the exit code stays what it is."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def emit(document: Any) -> None:
    """The one JSON document on standard output, in ASCII: valid in any encoding, and it can't command a terminal."""
    with _reader_may_leave():
        print(json.dumps(document, indent=2))


def say(text: object) -> None:
    """Lines of the result, on standard output."""
    with _reader_may_leave():
        print(plain(text))


def put(text: str) -> None:
    """Text that is safe to show already, as it is, on standard output."""
    with _reader_may_leave():
        print(text, end="")


def show(renderable: Any) -> None:
    """Text (a string) or something that rich draws, on standard output. Only a terminal's width wraps text."""
    from optimize.terminal import console, safe

    screen = console()
    with _reader_may_leave():
        if isinstance(renderable, str):
            screen.print(safe(renderable), soft_wrap=not screen.is_terminal)
        else:
            screen.print(renderable)


def note(text: object) -> None:
    """A line for people, out of the way of the result."""
    print(plain(text), file=sys.stderr)


@contextmanager
def stdout_for_the_result() -> Iterator[None]:
    """While work runs, whatever libraries and child processes print goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def failure(error: BaseException) -> dict[str, Any]:
    """The JSON document of an error: the run's own where it got far enough to have one."""
    if isinstance(document := getattr(error, "document", None), dict):
        return document
    from optimize.run import describe_error

    told = describe_error(error)
    if isinstance(error, RecipeError):
        from optimize.recipe.diagnostics import render

        told["diagnostics"] = json.loads(render(error.diagnostics, "json"))
    return {"schema": 1, "error": told}


def report(
    error: BaseException, *, as_json: bool, style: OutputFormat, debug: bool, mistakes: Callable[[str], None]
) -> int:
    """Say what went wrong and give the exit code. `mistakes` (`say` or `note`) tells those of a recipe."""
    if as_json:
        emit(failure(error))
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    if isinstance(error, KeyboardInterrupt):
        note("Interrupted. What was finished is kept; the same command goes on from there.")
        return INTERRUPTED
    if isinstance(error, RecipeError) and error.diagnostics and not as_json:
        from optimize.recipe.diagnostics import render

        mistakes(render(error.diagnostics, style.value))
        note(f"{len(error.diagnostics)} mistake{'s' if len(error.diagnostics) > 1 else ''} in the recipe")
    elif isinstance(error, OptimizeError):
        note(f"error: {error}")
    else:
        note(f"unexpected {type(error).__name__}: {_first_line(error)}")
        if not debug:
            note(f"  the details are in {_write_log(error)}")
    return error.exit_code if isinstance(error, OptimizeError) else UNEXPECTED


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "(no message)")


def _write_log(error: BaseException) -> str:
    """Keep the traceback in the work folder; where that can't be written, say how to see it."""
    from optimize.work import Work

    now = datetime.now(timezone.utc)
    path = Work().root / "logs" / f"{now:%Y%m%dT%H%M%S}-{os.getpid()}.log"
    lines = [f"{now.isoformat()} {sys.argv}\n", *traceback.format_exception(type(error), error, error.__traceback__)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError:
        return "no log (the work folder can't be written); `optimize --debug ...` prints them"
    return str(path)


def relative(path: Path) -> str:
    """A path as people type it: from the current folder where it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
