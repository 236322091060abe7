"""What has to run and what is there already. `plan` and `apply` decide with the same function, `decide`.

A stage's *key* names its work: a digest of everything that could change the result. A stage is CACHED when the store
knows its key. Where a parent has yet to run, the key of its children is not known yet: they are planned as RUN, and
`apply` still reuses them should the parent give the same bytes as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from optimize import tasks
from optimize.artifact import Artifact, digest_of
from optimize.recipe import SOURCE

if TYPE_CHECKING:
    import os

    from optimize.config import Block
    from optimize.data import Data
    from optimize.recipe import Recipe, Stage
    from optimize.source import SourceModel
    from optimize.source.modules import ModuleSource
    from optimize.stages import Entry
    from optimize.store import Store
    from optimize.work import Work


AnyBlock = TypeVar("AnyBlock", bound="Block")

SOURCE_VERSION = 1
"""Raised when the same source would be taken as other files than before; part of the source's cache key."""


@dataclass(frozen=True)
class Step:
    """One stage of a plan."""

    name: str
    id: str
    status: Literal["RUN", "CACHED"]
    why: str
    key: str | None = None
    """None where a parent has yet to run."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Everything that entered the key."""
    artifact: Artifact | None = None
    expected_seconds: float | None = None
    """What the same stage of the same recipe took last time, where that is known."""
    expected_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "stage": self.id,
            "status": self.status,
            "why": self.why,
            "key": self.key,
            "digest": self.artifact.digest if self.artifact else None,
            "expected_seconds": self.expected_seconds,
            "expected_bytes": self.expected_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """What `apply` would do now."""

    recipe: Recipe
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "recipe": self.recipe.name,
            "recipe_digest": self.recipe.digest,
            "steps": [step.to_json() for step in self.steps],
        }

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from optimize.notebook import shown

        return shown.plan(self)


def plan(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    work: Work | str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """Say for every stage whether it would run or be reused, and why. Fetches nothing and runs nothing."""
    from optimize.data import prepared
    from optimize.source import resolve_model

    recipe = as_recipe(recipe, overrides)
    work = as_work(work)
    task = tasks.get(recipe.model.task)
    data = prepared(recipe.data, task, work, recipe.base)
    steps: list[Step] = []
    if data is None:
        steps.append(_unknown(work.store, recipe, SOURCE, SOURCE, "the data is not prepared yet"))
    else:
        source = resolve_model(recipe.model, recipe.base)
        spec = task.spec(recipe.data, data.info)
        steps.append(decide_source(work.store, recipe, source, spec))
    known = {SOURCE: steps[0].artifact}
    for stage in recipe.stages:
        missing = [name for name in ancestors(stage) if known[name] is None]
        if data is None or missing:
            why = f"after {missing[0]}" if missing else "the data is not prepared yet"
            step = _unknown(work.store, recipe, stage.name, stage.id, why)
        else:
            step = decide(work.store, recipe, stage, {k: v for k, v in known.items() if v is not None}, data)
        known[stage.name] = step.artifact
        steps.append(step)
    return Plan(recipe, tuple(steps))


def decide_source(store: Store, recipe: Recipe, source: SourceModel | ModuleSource, spec: Mapping[str, Any]) -> Step:
    """The source model as an artifact: reused when the same files were taken for the same task before."""
    inputs = {
        "source": source.identity,
        "version": SOURCE_VERSION,
        "task": dict(spec),
        "trust_remote_code": recipe.model.runs_code,
    }
    return _decide(store, recipe, SOURCE, SOURCE, inputs)


def decide(store: Store, recipe: Recipe, stage: Stage, known: Mapping[str, Artifact], data: Data) -> Step:
    """Whether a stage's result is there already. `known` holds the artifacts that it builds on or reads."""
    inputs = _key_inputs(stage, known, data)
    if others := sources(recipe, stage):
        inputs["sources"] = {field: source.identity for field, source in others.items()}
    return _decide(store, recipe, stage.name, stage.id, inputs)


def sources(recipe: Recipe, stage: Stage) -> dict[str, SourceModel]:
    """The models elsewhere that a stage's config names, by field. Raises `SourceError` where nothing is there."""
    from optimize.source import SourceModel, resolve_model

    found = {}
    for field_name in stage.entry.sources:
        if (named := getattr(stage.config, field_name)) is not None:
            model = recipe.model.model_copy(update={**_PLAIN, "source": named})
            source = resolve_model(model, recipe.base)
            assert isinstance(source, SourceModel)
            found[field_name] = source
    return found


_PLAIN = {"module": None, "image": None, "revision": None, "trust_remote_code": False}
"""Of the recipe's model, what says nothing about another one."""


def ancestors(stage: Stage) -> tuple[str, ...]:
    """Names of the stages whose artifacts a stage needs: its parent, then those its config names."""
    return (stage.parent, *stage.reads)


def resolve_config(config: AnyBlock) -> AnyBlock:
    """Fill in what the machine decides, so that the key says what really happens.

    That is `device: auto`, `threads: null`, and `compute_dtype: auto` (bfloat16 where the device multiplies in it).
    """
    from optimize.config import Block
    from optimize.evaluate.host import computes_in, cpu_count, cuda_devices

    open_fields = config.model_dump(include={"device", "threads", "compute_dtype"})
    decided: dict[str, Any] = {name: resolve_config(value) for name, value in config if isinstance(value, Block)}
    if open_fields.get("device") == "auto":
        decided["device"] = "cuda" if cuda_devices() else "cpu"
    if open_fields.get("compute_dtype") == "auto":
        on_cpu = {**open_fields, **decided}.get("device") == "cpu"
        decided["compute_dtype"] = "float32" if on_cpu and not computes_in("bfloat16") else "bfloat16"
    if open_fields.get("threads", 0) is None:
        decided["threads"] = cpu_count()
    return config.model_copy(update=decided)


def _key_inputs(stage: Stage, known: Mapping[str, Artifact], data: Data) -> dict[str, Any]:
    entry = stage.entry
    return {
        "parent": known[stage.parent].digest,
        "task": tasks.get(known[stage.parent].task["name"]).VERSION,
        "stage": entry.id,
        "backend": entry.backend,
        "version": entry.load().VERSION,
        "config": resolve_config(stage.config).model_dump(mode="json", exclude=set(entry.aside)),
        "data": {split: data.digests[split] for split in entry.splits if split in data.digests},
        "reads": {name: known[name].digest for name in stage.reads},
        "libraries": _libraries(entry, stage.config),
    }


def _libraries(entry: Entry, config: Block) -> dict[str, str]:
    """Major.minor versions: a patch release is taken to compute the same."""
    from importlib.metadata import version

    asked = [name for option, (name, _) in entry.options.items() if getattr(config, option) is not None]
    return {name: ".".join(version(name).split("+")[0].split(".")[:2]) for name in (*entry.libraries, *asked)}


def _decide(store: Store, recipe: Recipe, name: str, id: str, inputs: dict[str, Any]) -> Step:
    key = digest_of(inputs)
    artifact = store.get(key)
    past = store.records_for(recipe.name, name)
    if artifact is not None:
        return Step(name, id, "CACHED", "reused", key, inputs, artifact, 0.0, artifact.size_bytes)
    if store.record(key) is not None:
        why = "its artifact was removed"
    elif not past:
        why = "never run"
    else:
        why = "; ".join(_differences(past[0]["inputs"], inputs)) or "never run"
    seconds, size = _expected(past)
    return Step(name, id, "RUN", why, key, inputs, None, seconds, size)


def _unknown(store: Store, recipe: Recipe, name: str, id: str, why: str) -> Step:
    seconds, size = _expected(store.records_for(recipe.name, name))
    return Step(name, id, "RUN", why, expected_seconds=seconds, expected_bytes=size)


def _expected(past: Sequence[Mapping[str, Any]]) -> tuple[float | None, int | None]:
    return (past[0].get("seconds"), past[0].get("size_bytes")) if past else (None, None)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Fields that differ, as `epochs: 1 -> 2`. Digests are too long to read: they only say that they changed."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        below = "" if path in ("", "config") else f"{path}."
        return [
            line
            for name in names
            if old.get(name) != new.get(name)
            for line in _differences(old.get(name), new.get(name), name if not path else f"{below}{name}")
        ]
    if any(isinstance(value, str) and value.startswith("sha256:") for value in (old, new)):
        return [f"{path} changed"]
    return [f"{path}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    from optimize.recipe import Recipe, load

    if not isinstance(recipe, Recipe):
        return load(recipe, overrides)
    return load(recipe.document(), overrides, env=False, base=recipe.base) if overrides else recipe


def as_work(work: Work | str | Path | None) -> Work:
    from optimize.work import Work

    return work if isinstance(work, Work) else Work(work)
