"""`optimize stages`: what there is, and all there is to know about one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError
from optimize.stages import Entry, entries

if TYPE_CHECKING:
    from rich.console import RenderableType


def listing() -> list[dict[str, Any]]:
    """Every stage, as JSON."""
    return [_entry(entry) for entry in entries()]


def explain(name: str) -> list[dict[str, Any]]:
    """Every back end of `quantize.int8` (or of `int8`): as `listing`, with its documentation and fields.

    Raises `RecipeError` where there is none.
    """
    found = [entry for entry in entries() if name in (entry.id, entry.method)]
    if not found:
        known = list(dict.fromkeys(entry.id for entry in entries()))
        near = get_close_matches(name, known, 1) or get_close_matches(name, [one.split(".")[1] for one in known], 1)
        hint = f"did you mean {near[0]!r}?" if near else "`optimize stages` lists them"
        raise RecipeError(f"there is no stage {name!r}", hint=hint)
    return [_explained(entry) for entry in found]


def _entry(entry: Entry) -> dict[str, Any]:
    missing = [library for library in entry.needs if not _installed(library)]
    return {
        "stage": entry.id,
        "backend": entry.backend,
        "takes": list(entry.takes),
        "gives": entry.gives,
        "summary": entry.summary,
        "installed": not missing,
        "missing": missing,
        "install": _command(entry, missing),
    }


def _explained(entry: Entry) -> dict[str, Any]:
    module = entry.load()
    schema = module.Config.model_json_schema()
    fields = {name: _resolve(field, schema) for name, field in schema.get("properties", {}).items()}
    required = schema.get("required", [])
    return {
        **_entry(entry),
        "module": entry.module,
        "version": module.VERSION,
        "documentation": inspect.cleandoc(module.__doc__ or ""),
        "fields": {name: {**field, "required": name in required} for name, field in fields.items()},
    }


def _resolve(field: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A field's schema with a reference to a nested block followed; the field's own words win."""
    if "$ref" not in field:
        return dict(field)
    block = schema["$defs"][field["$ref"].rsplit("/", 1)[1]]
    return {**block, **{key: value for key, value in field.items() if key != "$ref"}}


def _installed(library: str) -> bool:
    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True


def _command(entry: Entry, missing: Sequence[str]) -> str | None:
    if not missing:
        return None
    return f"pip install 'optimize-workbench[{entry.extra}]'" if entry.extra else f"pip install {' '.join(missing)}"


def table(described: Sequence[Mapping[str, Any]]) -> RenderableType:
    from optimize.terminal import plain_table, safe

    rows = plain_table("stage", "back end", "takes", "gives", "installed", "what it does")
    for one in described:
        rows.add_row(
            safe(one["stage"]),
            safe(one["backend"] or ""),
            safe(", ".join(one["takes"])),
            safe(one["gives"]),
            safe("yes" if one["installed"] else f"no: {one['install']}"),
            safe(one["summary"]),
        )
    return rows


def explanation(described: Sequence[Mapping[str, Any]]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from optimize.terminal import plain_table, safe

    parts: list[RenderableType] = []
    for one in described:
        backend = f" ({one['backend']})" if one["backend"] else ""
        takes = f"{', '.join(one['takes'])} -> {one['gives']}"
        fields = plain_table("field", "type", "default", "what it says")
        for name, field in one["fields"].items():
            default = "required" if field["required"] else value_words(field.get("default"))
            fields.add_row(safe(name), safe(type_words(field)), safe(default), safe(field.get("description", "")))
        head = Text.assemble(safe(one["stage"], "bold"), safe(f"{backend}  {takes}"))
        parts += [head, Text(), safe(_reflowed(one["documentation"])), Text(), fields]
        if one["install"]:
            parts += [Text(), safe(f"Not installed. Add it with: {one['install']}", "yellow")]
    return Group(*parts)


def _reflowed(documentation: str) -> str:
    """Paragraphs as one line each, so that they wrap at the terminal's width; indented blocks stay as they are."""
    blocks = documentation.split("\n\n")
    return "\n\n".join(block if "\n " in f"\n{block}" else block.replace("\n", " ") for block in blocks)


def type_words(field: Mapping[str, Any]) -> str:
    """A JSON Schema type in few words, such as `integer >= 1` or `dynamic | static`."""
    if "enum" in field:
        return " | ".join(value_words(value) for value in field["enum"])
    if "const" in field:
        return value_words(field["const"])
    if "anyOf" in field:
        return " | ".join(type_words(choice) for choice in field["anyOf"])
    name = str(field.get("type", "any"))
    if name == "array":
        return f"list of {type_words(field.get('items', {}))}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return " ".join([name, ", ".join(bounds)]) if bounds else name


def value_words(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
