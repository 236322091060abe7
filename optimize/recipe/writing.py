"""A recipe as YAML for people: what equals a default is left out, and reading it gives the same digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimize import stages as registry
from optimize import tasks
from optimize.errors import RecipeError
from optimize.recipe import SOURCE, reader
from optimize.recipe.limits import MEASURED

if TYPE_CHECKING:
    from optimize.recipe import Gate, Recipe, Stage


def to_yaml(recipe: Recipe) -> str:
    """The file's text. Values inside a block's keys stand on one line."""
    blocks = {
        key: [{name: _in_line(part) for name, part in one.items()} for one in value]
        if key in ("stages", "gates", "track")
        else {name: _in_line(part) for name, part in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in short(recipe).items()
    }
    text: str = yaml.dump(
        blocks, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110
    )
    return text


def short(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what its readers fill in."""
    blocks = {
        "version": recipe.version,
        "name": recipe.name,
        "model": recipe.model.model_dump(mode="json", exclude_defaults=True),
        "data": recipe.data.model_dump(mode="json", exclude_defaults=True),
        "stages": [_stage(recipe, number) for number in range(len(recipe.stages))],
        "baseline": recipe.baseline if recipe.baseline != SOURCE else None,
        "evaluate": _evaluate(recipe),
        "gates": _gates(recipe.gates),
        "promote": recipe.promote.model_dump(mode="json", exclude_defaults=True) if recipe.promote else None,
        "against": {"gates": _gates(recipe.against)} if recipe.against else None,
        "track": [target.document() for target in recipe.track],
    }
    return {key: value for key, value in blocks.items() if value or key in ("data", "version")}


def _gates(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    return [gate.model_dump(mode="json", exclude_defaults=True) for gate in gates]


def check_movable(recipe: Recipe, folder: Path) -> None:
    """Raises `RecipeError` where the recipe names a file by a path that leads elsewhere from `folder`."""
    if folder.resolve() == recipe.base.resolve():
        return
    for where, path in _paths(recipe):
        if not Path(path).is_absolute() and "://" not in path and (recipe.base / path).exists():
            raise RecipeError(
                f"`{where}` is {path!r}, a path that starts from {recipe.base}",
                hint="save the recipe in that folder, or give absolute paths",
            )


def _stage(recipe: Recipe, number: int) -> dict[str, Any]:
    stage = recipe.stages[number]
    before = recipe.stages[number - 1].name if number else SOURCE
    said = {
        stage.verb: stage.method,
        "name": stage.name if stage.name != stage.method else None,
        "from": stage.parent if stage.parent != before else None,
        "backend": stage.entry.backend if _has_choice(recipe, stage) else None,
    }
    config = stage.config.model_dump(mode="json", exclude_defaults=True)
    return {**{key: value for key, value in said.items() if value is not None}, **config}


def _has_choice(recipe: Recipe, stage: Stage) -> bool:
    """Whether another back end of the method takes what the stage builds on, too."""
    given = recipe.model.format if stage.parent == SOURCE else recipe.stage(stage.parent).format
    return sum(given in entry.takes for entry in registry.find(stage.verb, stage.method)) > 1


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    said = recipe.evaluate.model_dump(mode="json", exclude_defaults=True)
    judged = [gate.metric for gate in (*recipe.gates, *recipe.against)]
    named = [*judged, recipe.promote.select if recipe.promote else None]
    filled_in = [
        *tasks.get(recipe.model.task).default_metrics,
        *(name for name in named if name not in (None, *MEASURED)),
    ]
    if said.get("metrics") == list(dict.fromkeys(filled_in)):
        del said["metrics"]
    return said


def _paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every address in the recipe that could be a path, and where it stands."""
    found: list[tuple[str, Any]] = [("model.source", recipe.model.source), ("data.source", recipe.data.source)]
    found += [(f"data.splits.{name}", value) for name, value in recipe.data.splits.items()]
    found += [
        (f"stages.{stage.name}.{field}", getattr(stage.config, field))
        for stage in recipe.stages
        for field in stage.entry.sources
    ]
    yield from ((where, value) for where, value in found if isinstance(value, str))


_LONG = 100


class _Mapping(dict[str, Any]):
    """Stands on one line."""


class _List(list[Any]):
    """Stands on one line."""


def _in_line(value: Any) -> Any:
    """A mapping or list in one line, where that is not too long."""
    if len(str(value)) > _LONG:
        return value
    if isinstance(value, dict):
        return _Mapping({key: _in_line(part) for key, part in value.items()})
    return _List(_in_line(part) for part in value) if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Quotes what the reader of recipes, which keeps to YAML 1.2, would not take for a string; PyYAML keeps to 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _string(dumper: Any, value: str) -> Any:
    """Line breaks of every kind are escaped: outside double quotes they would be folded."""
    style = '"' if any(mark in value for mark in "\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _string)
for _tag, _pattern in reader.SCALARS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
_Dumper.add_representer(
    _Mapping, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=True)
)
_Dumper.add_representer(
    _List, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
