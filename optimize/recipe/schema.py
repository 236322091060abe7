"""A JSON Schema of recipes, for completion and red squiggles in an editor.

It says what can be said of structure: keys, types, ranges, which settings a method has. `load` knows more (names that
must exist, formats that must fit); whatever `load` takes, the schema takes too.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from optimize import stages, tasks
from optimize.recipe import LIMITS, NAME_PATTERN, Against, Evaluate, Gate, Model, Promote
from optimize.recipe.checks import Document
from optimize.recipe.limits import MEASURED
from optimize.track import TRACKERS, Tracker

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_STAGE_KEYS: dict[str, Any] = {
    "name": {
        "type": ["string", "null"],
        "pattern": NAME_PATTERN,
        "description": "The stage's name, unique in the recipe; the default is its method.",
    },
    "from": {
        "type": ["string", "null"],
        "description": "The stage whose artifact this one takes, or `source`; the default is the stage before.",
    },
}


def build() -> dict[str, Any]:
    """The schema (draft 2020-12) with every installed method and task."""
    every_task = [tasks.get(name) for name in tasks.names()]
    methods = [(entry, entry.load().Config) for entry in stages.entries()]
    trackers = [(tracker, tracker.load().Config) for tracker in TRACKERS.values()]
    blocks: list[type[BaseModel]] = [Document, Model, Evaluate, Gate, Promote, Against]
    blocks += [task.Data for task in every_task] + [config for _, config in methods]
    blocks += [config for _, config in trackers]
    refs, combined = models_json_schema([(block, "validation") for block in dict.fromkeys(blocks)])
    definitions: dict[str, Any] = combined["$defs"]

    def name_of(block: type[BaseModel]) -> str:
        return str(refs[block, "validation"]["$ref"]).rpartition("/")[2]

    known_metrics = [*dict.fromkeys(metric for task in every_task for metric in task.metrics), *MEASURED]
    gate = definitions[name_of(Gate)]
    gate["oneOf"] = [{"required": [limit], "properties": {limit: {"type": "number"}}} for limit in LIMITS]
    _suggest(gate["properties"]["metric"], known_metrics)
    _suggest(definitions[name_of(Model)]["properties"]["task"], list(tasks.names()))

    top: dict[str, Any] = definitions.pop(name_of(Document))
    configs = [_stage(entry, definitions[name_of(config)]) for entry, config in methods]
    one_tracker = _trackers([(tracker, definitions[name_of(config)]) for tracker, config in trackers])
    for config in {name_of(config) for _, config in (*methods, *trackers)}:
        del definitions[config]
    definitions["Track"] = one_tracker
    definitions["Stage"] = {"description": "One step of the chain.", "type": "object", "anyOf": configs}
    properties = top["properties"]
    _refer(properties["model"], name_of(Model))
    properties["data"] = {"type": "object", "description": properties["data"]["description"]}
    properties["stages"]["items"] = {"$ref": "#/$defs/Stage"}
    _refer(properties["evaluate"], name_of(Evaluate), null=True)
    _refer(properties["promote"], name_of(Promote), null=True)
    gates = {"type": "array", "items": {"$ref": f"#/$defs/{name_of(Gate)}"}}
    properties["gates"] = {"anyOf": [gates, {"type": "null"}], "description": properties["gates"]["description"]}
    _refer(properties["against"], name_of(Against), null=True)
    definitions[name_of(Against)]["properties"]["gates"]["items"] = gates["items"]
    track = {"$ref": "#/$defs/Track"}
    several = {"type": "array", "items": track}
    properties["track"] = {
        "anyOf": [track, several, {"type": "null"}],
        "description": properties["track"]["description"],
    }
    by_task = [
        {
            "if": {"properties": {"model": {"properties": {"task": {"const": task.name}}, "required": ["task"]}}},
            "then": {"properties": {"data": {"$ref": f"#/$defs/{name_of(task.Data)}"}}},
        }
        for task in every_task
    ]
    return {"$schema": DIALECT, **top, "title": "A recipe of optimize", "allOf": by_task, "$defs": definitions}


def _refer(place: dict[str, Any], name: str, *, null: bool = False) -> None:
    """Make a property a reference, with its own description kept."""
    description = place["description"]
    place.clear()
    reference = {"$ref": f"#/$defs/{name}"}
    place.update({"anyOf": [reference, {"type": "null"}]} if null else reference, description=description)


def _suggest(place: dict[str, Any], words: list[str]) -> None:
    """Offer words for completion without refusing others."""
    del place["type"]
    place["anyOf"] = [{"enum": words}, {"type": "string"}]


def _stage(entry: stages.Entry, config: dict[str, Any]) -> dict[str, Any]:
    """A stage's block: its verb, the common keys and the settings of its method."""
    backend = {
        "enum": [entry.backend, None],
        "description": "The library that does the work; the default follows from the input's format.",
    }
    return {
        "title": f"{entry.verb}: {entry.method}",
        "description": entry.summary,
        "type": "object",
        "additionalProperties": False,
        "required": [entry.verb, *config.get("required", ())],
        "properties": {
            entry.verb: {"const": entry.method, "description": entry.summary},
            **_STAGE_KEYS,
            "backend": backend,
            **config.get("properties", {}),
        },
    }


def _trackers(known: list[tuple[Tracker, dict[str, Any]]]) -> dict[str, Any]:
    """A tracker's name, or a block with its settings."""
    blocks = [
        {
            **config,
            "required": ["to"],
            "properties": {
                "to": {"const": tracker.name, "description": "The tracker."},
                **config.get("properties", {}),
            },
        }
        for tracker, config in known
    ]
    names = [tracker.name for tracker, _ in known]
    return {"description": "A tracker that the result is sent to.", "anyOf": [{"enum": names}, *blocks]}
