"""Overrides from outside the file: `--set stages.1.epochs=2` and `OPTIMIZE_RECIPE__STAGES__1__EPOCHS=2`.

A stage is named by its number, counted from 0, or its name (`stages.int8.mode=dynamic`); a gate by its number. In
variables `__` stands between keys, and case does not matter. Values are read as YAML.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from optimize.recipe.blocks import did_you_mean
from optimize.recipe.reader import parse_value
from optimize.recipe.text import MAX_DEPTH, Text, Trail
from optimize.stages import VERBS

PREFIX = "OPTIMIZE_RECIPE__"


def override(text: Text, overrides: Sequence[str], *, env: bool) -> None:
    """Change the values of `text`, and note where they came from. What names nothing becomes a diagnostic."""
    if not isinstance(text.value, dict):
        return
    if env:
        for variable in sorted(os.environ):
            if variable.upper().startswith(PREFIX):
                raw = os.environ[variable]
                keys = variable[len(PREFIX) :].split("__")
                _set(text, keys, raw, f"{variable}={raw}", separator="__", any_case=True)
    for override in overrides:
        where, equals, raw = override.partition("=")
        if equals:
            _set(text, where.strip().split("."), raw, f"--set {override}", separator=".", any_case=False)
        else:
            message, hint = "an override has the form KEY=VALUE", "such as stages.0.epochs=2"
            text.report_elsewhere(f"--set {override}", message, hint)


def _set(text: Text, keys: list[str], raw: str, origin: str, *, separator: str, any_case: bool) -> None:
    value, faults = parse_value(raw, origin)
    if faults:
        text.diagnostics.extend(replace(fault, path=separator.join(keys)) for fault in faults)
        return
    holder: Any = text.value
    trail: Trail = ()
    fresh: Trail | None = None
    while keys:
        step: str | int
        if len(trail) == MAX_DEPTH:
            text.report_elsewhere(origin, f"this is nested more than {MAX_DEPTH} deep")
            return
        if isinstance(holder, list):
            step, keys, fault = _item(holder, keys, stages=trail == ("stages",), separator=separator, any_case=any_case)
            if fault:
                text.report_elsewhere(origin, *fault, trail)
                return
        elif isinstance(holder, dict):
            step, keys = _key(holder, keys[0], any_case=any_case), keys[1:]
            if keys and holder.get(step) is None:
                holder[step] = {}
                fresh = fresh or (*trail, step)
        else:
            text.report_elsewhere(origin, f"there is nothing below this value to set `{keys[0]}` in", None, trail)
            return
        trail = (*trail, step)
        if keys:
            holder = holder[step]
        else:
            holder[step] = value
    text.replace(fresh or trail, origin)


def _key(holder: dict[str, Any], key: str, *, any_case: bool) -> str:
    if not any_case or key in holder:
        return key
    return next((known for known in holder if known.lower() == key.lower()), key.lower())


def _item(
    holder: list[Any], keys: list[str], *, stages: bool, separator: str, any_case: bool
) -> tuple[int, list[str], tuple[str, str | None] | None]:
    """The place in a list, the keys that are left, or what is wrong. A stage's name may hold the separator."""
    if keys[0].isascii() and keys[0].isdigit():
        if len(keys[0]) < 10 and int(keys[0]) < len(holder):
            return int(keys[0]), keys[1:], None
        return 0, keys, (f"there is no number {keys[0]:.20} here: {len(holder)} in all, counted from 0", None)
    if not stages:
        return 0, keys, (f"`{keys[0]}` must be a number, counted from 0", None)
    names = [_stage_name(block) for block in holder]
    for used in range(len(keys), 0, -1):
        wanted = separator.join(keys[:used])
        for index, name in enumerate(names):
            if name and (name == wanted or (any_case and name.lower() == wanted.lower())):
                return index, keys[used:], None
    return 0, keys, (f"no stage is named `{keys[0]}`", did_you_mean(keys[0], [name for name in names if name]))


def _stage_name(block: Any) -> str:
    if not isinstance(block, dict):
        return ""
    named = [block.get("name"), *(block.get(verb) for verb in VERBS)]
    return next((name for name in named if isinstance(name, str)), "")
