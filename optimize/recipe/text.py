"""The values of a recipe, the place in the file of each, and the mistakes found in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from pydantic import BaseModel

from optimize.errors import Diagnostic, RecipeError
from optimize.recipe.diagnostics import render

Trail = tuple[str | int, ...]
"""The way to a value from the top: ("stages", 2, "epochs")."""

MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_MISTAKES = 1_000
"""A recipe with more gets no complete list: finding suggestions for all of them would take long."""
SURROGATE = re.compile("[\ud800-\udfff]")


def format_trail(trail: Trail) -> str:
    """`stages[2].epochs`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in trail).lstrip(".")


@dataclass
class Text:
    """A parsed recipe, where its parts stand, and the mistakes found so far."""

    file: str
    lines: list[str] = field(default_factory=list)
    value: Any = None
    places: dict[Trail, tuple[int, int]] = field(default_factory=dict)
    """Where a value begins: line and column, counted from 1."""
    key_places: dict[Trail, tuple[int, int]] = field(default_factory=dict)
    """Where the key of that value begins."""
    origins: dict[Trail, str] = field(default_factory=dict)
    """Values that came from outside the text: `--set stages.1.epochs=2`."""
    spoiled: set[Trail] = field(default_factory=set)
    """Values that were wrong as text already: that they are of the wrong kind as well is no second mistake."""
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def report(self, trail: Trail, message: str, hint: str | None = None, *, key: bool = False) -> None:
        """Note a mistake in the value at `trail` (or in its key), or in the nearest thing above it that has a place."""
        if trail in self.spoiled and not key:
            return
        for length in range(len(trail), -1, -1):
            near = trail[:length]
            if near in self.origins:
                self.report_elsewhere(self.origins[near], message, hint, trail)
                return
            place = self.key_places.get(near) if key else None
            if place := place or self.places.get(near):
                self.report_at(place, message, hint, trail)
                return
        self.report_elsewhere(self.file, message, hint, trail)

    def location(self, trail: Trail) -> str | None:
        """`recipe.yaml:12:5`, where the value at `trail` begins; None where it stands in no text."""
        place = self.places.get(trail)
        return f"{self.file}:{place[0]}:{place[1]}" if place else None

    def spoil(self, trail: Trail, message: str, hint: str | None = None) -> None:
        """Note that a value can't be read; nothing else will be said of it."""
        self.report(trail, message, hint)
        self.spoiled.add(trail)

    def report_at(self, place: tuple[int, int], message: str, hint: str | None = None, trail: Trail = ()) -> None:
        line, column = place
        source = self.lines[line - 1] if line <= len(self.lines) else ""
        self._add(Diagnostic(_clip(message), _clip(format_trail(trail)), hint, self.file, line, column, source))

    def report_elsewhere(self, where: str, message: str, hint: str | None = None, trail: Trail = ()) -> None:
        """Note a mistake that stands in no text: in an override or in a mapping given from Python."""
        self._add(Diagnostic(_clip(message), _clip(format_trail(trail)), hint, _clip(where), line=0, column=0))

    def _add(self, found: Diagnostic) -> None:
        if len(self.diagnostics) < MAX_MISTAKES and found not in self.diagnostics:
            self.diagnostics.append(found)

    def replace(self, trail: Trail, origin: str) -> None:
        """Forget where the text had the value at `trail`: it comes from `origin` now."""
        for known in (self.places, self.key_places, self.origins):
            for old in [old for old in known if old[: len(trail)] == trail]:
                del known[old]
        self.spoiled = {old for old in self.spoiled if old[: len(trail)] != trail}
        self.origins[trail] = origin

    def raise_mistakes(self) -> None:
        """Raise `RecipeError` where there are any, in the order of the text."""
        if not self.diagnostics:
            return
        found = sorted(self.diagnostics, key=lambda item: (not item.line, item.line, item.column))
        count = "a mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise RecipeError(f"{self.file} has {count}\n{render(found, 'concise')}", diagnostics=found)


def from_mapping(value: Any, file: str = "<recipe>") -> Text:
    """Take a recipe that was made in Python; tuples become lists, paths strings, blocks what they say."""
    from optimize.recipe.objects import written

    text = Text(file)
    count = 0

    def plain(item: Any, trail: Trail) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES or len(trail) > MAX_DEPTH:
            raise OverflowError
        if isinstance(item, PathLike):
            item = fspath(item)
        if isinstance(item, BaseModel):
            item = written(item)
        if isinstance(item, Mapping):
            for key in item:
                if not isinstance(key, str):
                    text.report_elsewhere(file, f"a key must be a string, got {key!r:.80}", None, trail)
            return {_sound(key): plain(part, (*trail, key)) for key, part in item.items() if isinstance(key, str)}
        if isinstance(item, list | tuple):
            return [plain(part, (*trail, i)) for i, part in enumerate(item)]
        if isinstance(item, str):
            return _sound(item)
        if item is None or isinstance(item, bool):
            return item
        known = type(item) in {int, float}
        fault = number_fault(item) if known else f"a {type(item).__name__} has no place in a recipe"
        if fault:
            text.spoil(trail, fault)
            return str(item)
        return item

    try:
        text.value = plain(value, ())
    except OverflowError:
        text.report((), f"a recipe has at most {MAX_VALUES:,} values, nested at most {MAX_DEPTH} deep")
    return text


def _clip(text: str) -> str:
    """What a message quotes may be as long as a recipe."""
    return text if len(text) <= 400 else text[:396] + " ..."


def _sound(string: str) -> str:
    """Without lone surrogates, which no UTF-8 file can hold."""
    return SURROGATE.sub("\ufffd", string)


def number_fault(value: float) -> str | None:
    if isinstance(value, int):
        return None if -(1 << 63) <= value < 1 << 63 else "a whole number must fit 64 bits"
    return None if math.isfinite(value) else "a number must be finite and fit 64 bits"
