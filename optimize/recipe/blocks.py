"""A block of a recipe against its pydantic model, with every fault said in the words of a recipe."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from optimize.config import Block
from optimize.recipe.text import MAX_MISTAKES, Text, Trail

B = TypeVar("B", bound=Block)


def did_you_mean(word: Any, known: Iterable[str]) -> str | None:
    """The nearest of the known words, or all of them where none is near and they are few."""
    words = sorted(set(known))
    if not words:
        return None
    lower = {name.lower(): name for name in words}
    near = difflib.get_close_matches(str(word)[:80].lower(), lower, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{lower[near[0]]}`?"
    return f"known: {', '.join(words)}" if len(words) <= 24 else None


def show(value: Any) -> str:
    """A value as a message quotes it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    shown = "null" if value is None else repr(value) if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= 60 else shown[:56] + " ..."


def read_block(text: Text, model: type[B], value: Any, trail: Trail, *, also: Sequence[str] = ()) -> B | None:
    """The block as an object, or None and a diagnostic for every fault.

    `also` are keys that stand in the same block of the text and belong to somebody else: "did you mean" offers them.
    Validation is strict JSON: "2" is no number and "yes" no truth value.
    """
    if not isinstance(value, dict):
        text.report(trail, f"expected a mapping of keys, got {show(value)}")
        return None
    try:
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reading = _Reading(text, model, value, trail, also)
        faults: dict[tuple[Trail, str], list[Any]] = {}
        for fault in error.errors(include_url=False)[:MAX_MISTAKES]:
            inner, rest = _walk(value, fault["loc"])
            kind = fault["type"] if fault["type"] in {"missing", "extra_forbidden"} else "value"
            # A missing key is told apart by its name; the branches of a union are one fault.
            faults.setdefault((inner, f"{kind}{rest[:1] if kind == 'missing' else ''}"), []).append(fault)
        for (inner, _), group in faults.items():
            # A list is also "too short" when one of its items is refused.
            if not any(len(other) > len(inner) and other[: len(inner)] == inner for other, _ in faults if inner):
                reading.report(inner, group)
        return None


@dataclass(frozen=True)
class _Reading:
    """A block that was refused."""

    text: Text
    model: type[Block]
    value: dict[str, Any]
    trail: Trail
    also: Sequence[str]

    def report(self, inner: Trail, group: list[Any]) -> None:
        """Say what pydantic found at one place of the block; several faults are the branches of a union."""
        here, first = (*self.trail, *inner), group[0]
        if first["type"] == "missing":
            self.text.report(here, f"the key `{first['loc'][-1]}` is missing", key=True)
        elif first["type"] == "extra_forbidden":
            owner = _annotation(self.model, inner[:-1])[0]
            known = [*(owner.model_fields if _is_model(owner) else ()), *(self.also if len(inner) == 1 else ())]
            self.text.report(here, f"unknown key `{inner[-1]}`", did_you_mean(inner[-1], known), key=True)
        elif "[key]" in first["loc"]:
            expected = first.get("ctx", {}).get("expected")
            self.text.report(here, f"unknown key `{inner[-1]}`", expected and f"expected {expected}", key=True)
        else:
            self.text.report(here, *self._value_fault(inner, group))

    def _value_fault(self, inner: Trail, group: list[Any]) -> tuple[str, str | None]:
        reason = next((fault["ctx"]["error"] for fault in group if "error" in fault.get("ctx", {})), None)
        if isinstance(reason, Exception):
            return str(reason) or "this value is refused", None
        got: Any = self.value
        for step in inner:
            got = got[step]
        annotation, metadata = _annotation(self.model, inner)
        choices = _choices(annotation) if isinstance(got, str) else []
        expected = describe(annotation, metadata) if annotation is not None else None
        message = f"expected {expected}" if expected else group[0]["msg"]
        return f"{message}, got {show(got)}", did_you_mean(got, choices)


def _walk(value: Any, location: tuple[Any, ...]) -> tuple[Trail, tuple[Any, ...]]:
    """Pydantic's location without the names of union branches, and what names nothing in the value (a missing key)."""
    trail: list[str | int] = []
    rest: list[Any] = []
    for part in location:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
            trail.append(part)
        else:
            rest.append(part)
    return tuple(trail), tuple(rest)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _annotation(model: Any, inner: Trail) -> tuple[Any, list[Any]]:
    """The type that the model wants at a place below it, and its bounds. (None, []) where it can't be told."""
    annotation: Any = model
    metadata: list[Any] = []
    for step in inner:
        arms = [arm for arm, _ in _arms(annotation, [])]
        annotation, metadata = None, []
        for arm in arms:
            if _is_model(arm) and isinstance(step, str):
                fields: Mapping[str, FieldInfo] = arm.model_fields
                named = {field.alias or name: field for name, field in fields.items()}
                if step in named:
                    annotation, metadata = named[step].annotation, list(named[step].metadata)
            elif get_origin(arm) in {list, tuple, dict} and isinstance(step, int) == (get_origin(arm) is not dict):
                parts = [part for part in get_args(arm) if part is not Ellipsis]
                annotation = parts[-1] if parts else None
        if annotation is None:
            return None, []
    arms_now = _arms(annotation, metadata)
    if _is_model(annotation) or len(arms_now) != 1:
        return annotation, metadata
    return arms_now[0]


def _arms(annotation: Any, metadata: list[Any]) -> list[tuple[Any, list[Any]]]:
    """The arms of a union, `Annotated` unwrapped, without None."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        unpacked = [part for item in more for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _arms(inner, [*metadata, *unpacked])
    if get_origin(annotation) in {Union, types.UnionType}:
        return [arm for part in get_args(annotation) for arm in _arms(part, metadata)]
    return [] if annotation is type(None) else [(annotation, metadata)]


def _choices(annotation: Any) -> list[str]:
    return [
        choice
        for arm, _ in _arms(annotation, [])
        if get_origin(arm) is Literal
        for choice in get_args(arm)
        if isinstance(choice, str)
    ]


_PLURALS = {bool: "truth values", int: "whole numbers", float: "numbers", str: "strings"}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def describe(annotation: Any, metadata: list[Any]) -> str | None:
    """A type and its bounds in words: `a number above 0 and at most 1`."""
    words = []
    for arm, bounds in _arms(annotation, metadata):
        origin = get_origin(arm) or arm
        if origin is Literal:
            words.append("one of " + ", ".join(json.dumps(choice).strip('"') for choice in get_args(arm)))
        elif origin in {list, tuple}:
            parts = [part for part in get_args(arm) if part is not Ellipsis]
            items = [_PLURALS.get(arm) for arm, _ in _arms(parts[0], [])] if parts else []
            named = " or ".join(word for word in items if word)
            words.append("a list" + (f" of {named}" if named else "") + _length(bounds))
        elif origin is dict or _is_model(origin):
            words.append("a mapping of keys")
        elif origin in _WORDS:
            words.append(_WORDS[origin] + (_bounds(bounds) if origin in {int, float} else _length(bounds)))
        else:
            return None
    return " or ".join(dict.fromkeys(words)) or None


def _bounds(metadata: list[Any]) -> str:
    said = {
        name: getattr(item, name)
        for item in metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(item, name, None) is not None
    }
    if said.keys() == {"ge", "le"}:
        return f" between {said['ge']:g} and {said['le']:g}"
    names = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    parts = [f"{names[name]} {limit:g}" for name, limit in said.items()]
    return " " + " and ".join(parts) if parts else ""


def _length(metadata: list[Any]) -> str:
    least = next((item.min_length for item in metadata if getattr(item, "min_length", None)), None)
    most = next((item.max_length for item in metadata if getattr(item, "max_length", None)), None)
    said = [f"{least} or more"] * bool(least) + [f"at most {most}"] * bool(most)
    return f" ({', '.join(said)})" if said else ""
