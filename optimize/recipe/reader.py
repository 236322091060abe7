"""Safe YAML into plain values, with the place of every key and value.

The scalars follow YAML 1.2's core schema, so that a gate's `on:` is a string and `1e-4` a number (in YAML 1.1, which is
PyYAML's own reading, `on` is true and `1e-4` a string). Tags, non-string keys, repeated keys, several documents and
numbers that are not finite are refused; size, depth and what aliases expand to are bounded.
https://yaml.org/spec/1.2.2/#103-core-schema
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from optimize.errors import Diagnostic
from optimize.recipe.text import MAX_DEPTH, MAX_VALUES, SURROGATE, Text, Trail, number_fault

MAX_BYTES = 1 << 20

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# YAML's printable characters; what else a file holds is damage or an attack on the terminal that shows it.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
SCALARS = {
    "null": re.compile("^(" + "|".join(map(re.escape, _NULL)) + ")$"),
    "bool": re.compile("^(" + "|".join(_BOOL) + ")$"),
    "int": re.compile(f"^({_INT.pattern})$"),
    "float": re.compile(f"^({_FLOAT.pattern}|{_NOT_FINITE.pattern})$"),
}
"""YAML's tag -> what a scalar without quotes must look like to be of it."""


def read(file: Path) -> Text:
    """Read a recipe's file; see `parse`."""
    try:
        with file.open("rb") as stream:
            return parse(stream.read(MAX_BYTES + 1), str(file))
    except (OSError, ValueError) as error:
        text = Text(str(file))
        text.report_elsewhere(str(file), f"can't be read: {getattr(error, 'strerror', None) or error}")
        return text


def parse(raw: bytes, file: str) -> Text:
    """Read a recipe. Mistakes are in the result's `diagnostics`; where nothing could be read, `value` is None."""
    text = Text(file)
    if len(raw) > MAX_BYTES:
        text.report_at((1, 1), f"this file is too large: a recipe has at most {MAX_BYTES:,} bytes")
        return text
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", "replace")
        text.lines = raw.decode("utf-8-sig", "replace").splitlines()
        text.report_at(_place_after(before), "this is not UTF-8 text", "save the file as UTF-8")
        return text
    _read(text, decoded)
    return text


def parse_value(raw: str, where: str) -> tuple[Any, list[Diagnostic]]:
    """Read the value of an override: a scalar, or `[a, list]` or `{a: mapping}`."""
    text = Text(where)
    _read(text, raw)
    found = [Diagnostic(item.message, hint=item.hint, file=where, line=0, column=0) for item in text.diagnostics]
    return text.value, found


class _Hopeless(Exception):
    """A fault after which the rest of the text can't be read."""

    def __init__(self, mark: Any, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.place, self.message, self.hint = _place(mark), message, hint


@dataclass(frozen=True)
class _Node:
    """A value as composed, its scalars not read yet."""

    event: Any
    children: list[_Node] = field(default_factory=list)
    """A list's items; a mapping's keys and values in turn; of an alias the very node of its anchor."""


def _read(text: Text, decoded: str) -> None:
    text.lines = _LINE_BREAK.split(decoded)
    if unprintable := _UNPRINTABLE.search(decoded):
        place = _place_after(decoded[: unprintable.start()])
        text.report_at(place, f"the character U+{ord(unprintable[0]):04X} can't stand in a YAML file")
        return
    try:
        if root := _compose(yaml.parse(decoded, Loader=_LOADER)):
            text.value = _expand(text, root)
    except _Hopeless as fault:
        text.report_at(fault.place, fault.message, fault.hint)
    except yaml.MarkedYAMLError as error:
        message = error.problem or error.context or "can't be read"
        text.report_at(_place(error.problem_mark or error.context_mark), f"this is not YAML: {message}")
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        text.report_at((1, 1), f"this is not YAML: {error}")


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _place_after(before: str) -> tuple[int, int]:
    lines = _LINE_BREAK.split(before)
    return len(lines), len(lines[-1]) + 1


def _compose(events: Iterator[Any]) -> _Node | None:
    """The one document, or None where the text is empty."""
    anchors: dict[str, _Node | None] = {}
    count = 0

    def compose(event: Any, depth: int) -> _Node:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH:
            raise _Hopeless(event.start_mark, f"this is nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise _Hopeless(event.start_mark, f"a recipe has at most {MAX_VALUES:,} values")
        if isinstance(event, yaml.AliasEvent):
            target = anchors.get(str(event.anchor))
            if target is None:
                fault = "holds itself" if event.anchor in anchors else "has no anchor before it"
                raise _Hopeless(event.start_mark, f"the alias `*{event.anchor}` {fault}")
            return _Node(event, [target])
        if event.anchor is not None:
            anchors[event.anchor] = None
        node = _Node(event)
        if not isinstance(event, yaml.ScalarEvent):
            while not isinstance(child := next(events), yaml.CollectionEndEvent):
                node.children.append(compose(child, depth + 1))
        if event.anchor is not None:
            anchors[event.anchor] = node
        return node

    root: _Node | None = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if root is not None:
                raise _Hopeless(event.start_mark, "a file holds one recipe; a second YAML document begins here")
            root = compose(next(events), 0)
    return root


def _expand(text: Text, root: _Node) -> Any:
    """Nodes to values. An alias becomes a copy of its own, so that an override of one leaves the other."""
    count = 0

    def expand(node: _Node, trail: Trail, mark: Any) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES or len(trail) > MAX_DEPTH:
            raise _Hopeless(mark, f"aliases expand to more than {MAX_VALUES:,} values or {MAX_DEPTH} levels")
        text.places[trail] = _place(mark)
        event, children = node.event, node.children
        if isinstance(event, yaml.AliasEvent):
            return expand(children[0], trail, mark)
        if event.tag is not None:
            text.spoil(trail, f"YAML tags such as `{event.tag}` are refused", "leave the tag out")
        if isinstance(event, yaml.SequenceStartEvent):
            return [expand(item, (*trail, i), item.event.start_mark) for i, item in enumerate(children)]
        if isinstance(event, yaml.ScalarEvent):
            value, fault = _scalar(event)
            if fault:
                text.spoil(trail, fault)
            return value
        values: dict[str, Any] = {}
        for key, item in zip(children[::2], children[1::2], strict=True):
            place = _place(key.event.start_mark)
            name = _scalar(key.event)[0] if isinstance(key.event, yaml.ScalarEvent) else None
            if not isinstance(name, str) or key.event.tag is not None:
                hint = f'put it in quotes: "{key.event.value}"' if isinstance(key.event, yaml.ScalarEvent) else None
                text.report_at(place, "a key must be a string", hint, trail)
            elif name in values:
                hint = f"the first is on line {text.key_places[(*trail, name)][0]}"
                text.report_at(place, f"the key `{name}` is here twice", hint, (*trail, name))
            else:
                text.key_places[(*trail, name)] = place
                values[name] = expand(item, (*trail, name), item.event.start_mark)
        return values

    return expand(root, (), root.event.start_mark)


def _scalar(event: Any) -> tuple[Any, str | None]:
    """The value, and what is wrong with it."""
    raw: str = event.value
    if SURROGATE.search(raw):
        raise _Hopeless(event.start_mark, "this escape stands for no character")
    if not event.implicit[0]:
        return raw, None
    if raw in _NULL:
        return None, None
    if raw in _BOOL:
        return _BOOL[raw], None
    number: float
    if _INT.fullmatch(raw):
        # Python refuses to read thousands of digits.
        number = int(raw, 0 if raw[:2] in {"0o", "0x"} else 10) if len(raw) < 4000 else math.inf
    elif _FLOAT.fullmatch(raw):
        number = float(raw)
    else:
        return raw, "a number must be finite" if _NOT_FINITE.fullmatch(raw) else None
    fault = number_fault(number)
    return (raw, fault) if fault else (number, None)
