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
    """The recipe with stages and gates under names, so that one more is not a change of all after it."""
    lists = {"stages": "name", "gates": "metric"}
    return {**recipe, **{part: _by(recipe[part], name) for part, name in lists.items() if part in recipe}}


def _by(items: Any, name: str) -> Any:
    """A mapping from what each item has under `name` to the rest of it; the list as it is where one has no such thing.

    Several of one name are told apart by their number.
    """
    if not isinstance(items, list) or not all(isinstance(item, Mapping) and name in item for item in items):
        return items
    found: dict[str, Any] = {}
    for item in items:
        known = str(item[name])
        number = sum(other.partition("[")[0] == known for other in found)
        found[f"{known}[{number}]" if number else known] = {key: item[key] for key in item if key != name}
    return found


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
