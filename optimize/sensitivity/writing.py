"""The chosen settings as a recipe: the user's own text with `layers` in the stage, comments and all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.errors import RecipeError
from optimize.recipe import Recipe, load

if TYPE_CHECKING:
    from optimize.config import Block
    from optimize.recipe import Stage
    from optimize.sensitivity.knobs import Knob, Setting

_BLOCK = re.compile(r"(.+?\.\d+)\.")
"""A block's name at the beginning of a layer's."""


def config_of(stage: Stage, knob: Knob, chosen: Mapping[str, Setting]) -> Block:
    """The stage's config with the layers' settings, said briefly: what is as the stage says is left out, and a block
    whose layers are all alike is one glob.
    """
    config: Any = stage.config
    entries = knob.told(config, chosen).layers
    blocks: dict[str, list[str]] = {}
    for name in entries:
        found = _BLOCK.match(name)
        blocks.setdefault(found[1] if found else name, []).append(name)
    told: dict[str, Any] = {}
    for block, names in blocks.items():
        if len(names) > 1 and all(entries[name] == entries[names[0]] for name in names):
            told[f"{block}.*"] = entries[names[0]]
        else:
            told |= {name: entries[name] for name in names}
    usual = knob.usual(config)
    brief = {name: entry for name, entry in told.items() if entry.model_dump(exclude_none=True) != {knob.name: usual}}
    return stage.config.model_copy(update={"layers": brief})


def check_target(recipe: Recipe, target: Path) -> None:
    """Raises `RecipeError` where a recipe can't be written there, before any work is done for it."""
    if target.exists():
        raise RecipeError(f"{target} exists already", hint="name a file that does not exist yet")
    if not target.parent.is_dir():
        raise RecipeError(f"there is no folder {target.parent}", hint="make it first")
    document = recipe.document()
    named = [document["model"].get("source"), document["data"].get("source"), *document["data"]["splits"].values()]
    near = [name for name in named if isinstance(name, str) and not Path(name).is_absolute()]
    local = [name for name in near if (recipe.base / name).exists()]
    if local and target.absolute().parent != recipe.base.absolute():
        raise RecipeError(
            f"the recipe names {local[0]!r}, which starts from its own folder", hint=f"write to {recipe.base}"
        )


def write(recipe: Recipe, stage: Stage, config: Block, target: Path) -> bool:
    """Write the recipe with that config in place of the stage's own; False where that had to be done without the
    comments and the order of the file (a stage in braces, values from `--set`, a recipe that is no file).
    """
    expected = recipe.document()
    expected["stages"][stage.index].update(config.model_dump(mode="json"))
    layers = {name: entry.model_dump(exclude_none=True) for name, entry in config.layers.items()}  # type: ignore[attr-defined]
    temporary = atomic.sibling(target)
    if recipe.file is not None:
        text = edited(recipe.file.read_text(encoding="utf-8-sig"), stage, layers)
        if text is not None:
            try:
                temporary.write_text(text, encoding="utf-8")
                if load(temporary, env=False, base=recipe.base).document() == expected:
                    atomic.create(target, text.encode())
                    return True
            except RecipeError:
                pass  # the text is written in a way that was not foreseen
            finally:
                temporary.unlink(missing_ok=True)
    import yaml

    atomic.create(target, yaml.safe_dump(expected, sort_keys=False, allow_unicode=True).encode())
    return False


def edited(text: str, stage: Stage, layers: Mapping[str, Any]) -> str | None:
    """The recipe's text with these `layers` in a stage, in place of any that are there; None where the stage is not
    written one key a line.
    """
    from optimize.recipe.reader import parse

    parsed = parse(text.encode(), "")
    trail = ("stages", stage.index)
    keys = sorted(place for path, place in parsed.key_places.items() if path[:2] == trail and len(path) == 3)
    own = parsed.key_places.get((*trail, "layers"))
    verb = parsed.key_places.get((*trail, stage.verb))
    if verb is None or len({line for line, _ in keys}) < len(keys) or len({column for _, column in keys}) > 1:
        return None
    lines = text.splitlines(keepends=True)
    indent = keys[0][1] - 1
    if "{" in lines[keys[0][0] - 1][:indent]:
        return None
    if own is not None:
        first = own[0] - 1
        end = first + 1
        while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
            end += 1
        while not lines[end - 1].strip():
            end -= 1
        if own == keys[0]:  # it begins the stage, and what comes next would have to
            return None
        del lines[first:end]
    else:
        # Behind the setting that it is about, or the method.
        said = parsed.key_places.get((*trail, "bits")) or parsed.key_places.get((*trail, "sparsity")) or verb
        first = said[0]
        if not lines[first - 1].endswith("\n"):
            lines[first - 1] += "\n"
    lines[first:first] = _layers(layers, " " * indent)
    return "".join(lines)


def _layers(layers: Mapping[str, Any], indent: str) -> list[str]:
    if not layers:
        return []
    said = [f"{indent}  {json.dumps(name)}: {_flow(entry)}\n" for name, entry in layers.items()]
    return [f"{indent}layers:  # by `optimize sensitivity`\n", *said]


def _flow(entry: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in entry.items()) + "}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
