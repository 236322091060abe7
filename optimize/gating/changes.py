"""`against.changed` of run.json: what differs between the promoted version's run and this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimize.recipe import Recipe

MOST = 200
"""Differences told of one kind: a recipe that shares nothing with the old one needs no list."""
MAX_TEXT = 500
"""Characters of one value: what a remote tells is not ours."""


def changed(
    document: Mapping[str, Any], recipe: Recipe, before: Any, recipe_before: Any
) -> dict[str, list[dict[str, Any]]]:
    """By kind (`recipe`, `data`, `environment`, `host`) what has another value now.

    `document` is this run's. `before` and `recipe_before` are the run.json and recipe.json of the promoted version's
    run, None where they are not known: a kind of which nothing is known is left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    old_recipe = recipe_before.get("recipe") if isinstance(recipe_before, Mapping) else None
    if isinstance(old_recipe, Mapping):
        found["recipe"] = _differences(_named(old_recipe), _named(recipe.document()))
    if not isinstance(before, Mapping):
        return found
    if isinstance(before.get("data"), Mapping) and document["data"]:
        found["data"] = _differences(before["data"], document["data"], "data")
    host = before.get("host")
    if isinstance(host, Mapping):
        for kind, parts in (("environment", ("libraries", "python")), ("host", ("cpu", "memory_bytes", "os"))):
            now = {part: document["host"].get(part) for part in parts}
            found[kind] = _differences({part: host.get(part) for part in parts}, now)
    return found


def _named(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with its stages under their names, so that one more stage is not a change of all after it."""
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) and "name" in stage for stage in stages):
        return dict(recipe)
    by_name = {str(stage["name"]): {key: stage[key] for key in stage if key != "name"} for stage in stages}
    return {**recipe, "stages": by_name}


def _differences(before: Any, after: Any, path: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    _compare(before, after, path, found)
    return found


def _compare(before: Any, after: Any, path: str, found: list[dict[str, Any]]) -> None:
    if before == after or len(found) >= MOST:
        return
    old, new = _parts(before), _parts(after)
    if old is None or new is None:
        found.append({"what": path[:MAX_TEXT], "before": _short(before), "after": _short(after)})
        return
    for key in dict.fromkeys([*old, *new]):
        inner = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        _compare(old.get(key), new.get(key), inner, found)


def _parts(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Mapping):
        return dict(value)
    # A list of plain values is one value: `[1, 8] -> [1, 16]` says more than a change at place 1.
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return dict(enumerate(value))
    return None


def _short(value: Any) -> Any:
    """The value, or the beginning of what it looks like; null also stands for what was not there."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_TEXT:
        return text[: MAX_TEXT - 4] + " ..."
    return value
