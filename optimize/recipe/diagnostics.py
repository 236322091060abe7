"""Mistakes as text: for people (`full`), editors (`concise`), programs (`json`) and GitHub's annotations (`github`)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, get_args

from optimize.errors import Diagnostic

Format = Literal["full", "concise", "json", "github"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_SHOWN = 100
"""More mistakes than this are counted, not shown."""
_WIDTH = 100


def render(diagnostics: Sequence[Diagnostic], format: Format = "full") -> str:
    """The mistakes in one of the formats, without a final newline. No control character of the recipe gets through."""
    shown, hidden = diagnostics[:MAX_SHOWN], len(diagnostics) - MAX_SHOWN
    if format == "json":
        return json.dumps([_json(item) for item in shown], indent=2)
    one = {"full": _full, "concise": _concise, "github": _github}[format]
    parts = [one(item) for item in shown]
    if hidden > 0:
        parts.append(f"and {hidden} more mistakes")
    return ("\n\n" if format == "full" else "\n").join(parts)


def _full(item: Diagnostic) -> str:
    out = [f"error: {_safe(item.message)}", f"  --> {_safe(item.location)}"]
    if item.path:
        out[-1] += f"  ({_safe(item.path)})"
    if item.line:
        number = str(item.line)
        before, rest = _window(item.source_line, item.column)
        margin = " " * len(number)
        out += [f"{margin} |", f"{number} | {before}{rest}", f"{margin} | {' ' * _columns(before)}^"]
    if item.hint:
        out.append(f"  help: {_safe(item.hint)}")
    return "\n".join(out)


def _concise(item: Diagnostic) -> str:
    where = f" [{_safe(item.path)}]" if item.path else ""
    hint = f" ({_safe(item.hint)})" if item.hint else ""
    return f"{_safe(item.location)}: {_safe(item.message)}{where}{hint}"


def _json(item: Diagnostic) -> dict[str, object]:
    before, rest = _window(item.source_line, item.column)
    return {**asdict(item), "source_line": before + rest, "location": item.location}


def _github(item: Diagnostic) -> str:
    """https://docs.github.com/actions/reference/workflow-commands-for-github-actions"""
    message = _safe(item.message + (f" ({item.hint})" if item.hint else ""))
    if not item.line:
        return f"::error::{_escape(f'{_safe(item.file)}: {message}')}"
    file = _escape(_safe(item.file)).replace(":", "%3A").replace(",", "%2C")
    return f"::error file={file},line={item.line},col={item.column}::{_escape(message)}"


def _escape(value: str) -> str:
    """For a workflow command; line breaks are written out already."""
    return value.replace("%", "%25")


def _safe(value: str) -> str:
    """Control, formatting (bidirectional) and unassigned characters written out."""
    return "".join(
        character if character == " " or unicodedata.category(character)[0] not in "CZ" else ascii(character)[1:-1]
        for character in value
    )


def _window(line: str, column: int) -> tuple[str, str]:
    """The part of a line around a column, split before it; tabs as spaces."""
    at = max(column - 1, 0)
    start = max(0, at - _WIDTH // 2) if len(line) > _WIDTH else 0
    before = ("..." if start else "") + _safe(line[start:at].replace("\t", "    "))
    rest = line[at:]
    room = _WIDTH - (at - start)
    return before, _safe(rest[:room].replace("\t", "    ")) + ("..." if len(rest) > room else "")


def _columns(text: str) -> int:
    """How many cells of a terminal the text takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
