"""From a parsed text to a `Recipe`: every block against its schema, then one function a check.

A check that lacks what it needs (the task is unknown, a stage is broken) stays silent: one mistake, one message.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from optimize import tasks
from optimize.config import Block
from optimize.data import DataConfig
from optimize.recipe import SOURCE, Against, Evaluate, Gate, Model, Name, Promote, Recipe, Stage, leaves_of
from optimize.recipe.blocks import did_you_mean, read_block
from optimize.recipe.latency import Latency
from optimize.recipe.limits import MEASURED, RELATIVE, USER_METRIC, limit_fault, measure_fault, measured_of
from optimize.recipe.stages import MAX_STAGES, installed, read_stages
from optimize.recipe.text import Text, Trail
from optimize.recipe.track import read_track
from optimize.track import Target

MAX_GATES = 100


class Document(Block):
    """The top level of a recipe, version 1."""

    version: Literal[1]
    """The version of this schema."""
    name: Name
    """The recipe's name; the registry keeps what it promotes under it."""
    model: dict[str, Any]
    """Where the model comes from and what it is for."""
    data: dict[str, Any]
    """Where the rows are, their columns and how they are split."""
    stages: Annotated[list[Any], Field(min_length=1, max_length=MAX_STAGES)]
    """The chain: each stage takes the artifact of the one before (or of the one named in `from`)."""
    baseline: str = SOURCE
    """The stage that the others are compared with, or `source`, the model as it came."""
    evaluate: dict[str, Any] | None = None
    """What is measured of every artifact."""
    gates: Annotated[list[Any], Field(max_length=MAX_GATES)] | None = None
    """Limits that an artifact must keep to be promoted."""
    promote: dict[str, Any] | None = None
    """Give the passing artifact a version and an alias in the registry."""
    against: dict[str, Any] | None = None
    """How `optimize gate` judges a candidate over what is promoted now."""
    track: str | dict[str, Any] | list[Any] | None = None
    """Trackers that the result is sent to: `mlflow`, `tensorboard` or `wandb`, a block `{to: mlflow, ...}` with its
    settings, or a list of these."""


def check(text: Text, *, file: Path | None, base: Path) -> Recipe | None:
    """The recipe, or None and diagnostics in `text`."""
    top = text.value
    if not isinstance(top, dict):
        text.report((), "a recipe is a mapping of keys: version, name, model, data, stages, ...")
        return None
    version = top.get("version")
    if "version" not in top:
        text.report((), "the key `version` is missing", "begin with `version: 1`")
        version = 1
    if not isinstance(version, int) or isinstance(version, bool) or version not in READERS:
        known = ", ".join(str(number) for number in READERS)
        text.report(("version",), f"this optimize reads recipes of version {known}", "a newer one may be needed")
        return None
    return READERS[version](text, top, file, base)


@dataclass
class _Parts:
    """What could be read so far; None is what could not."""

    text: Text
    top: dict[str, Any]
    base: Path
    names: tuple[str, ...] | None = None
    """What `baseline`, `on` and `over` may say."""
    leaves: tuple[str, ...] | None = None
    """What a gate without `on` judges."""
    task: tasks.Task | None = None
    model: Model | None = None
    data: DataConfig | None = None
    stages: tuple[Stage, ...] | None = None
    baseline: str = SOURCE
    evaluate: Evaluate | None = None
    gates: tuple[tuple[int, Gate], ...] = ()
    against: tuple[tuple[int, Gate], ...] = ()
    promote: Promote | None = None
    track: tuple[Target, ...] = ()

    def evaluate_with_gates(self) -> Evaluate:
        """The task's default metrics where none are asked for, and those that only a gate or `select` names."""
        assert self.evaluate is not None
        asked = self.evaluate.metrics or (self.task.default_metrics if self.task else ())
        named = [gate.metric for _, gate in (*self.gates, *self.against)] + [
            self.promote.select if self.promote else None
        ]
        added = [name for name in named if name and name not in MEASURED]
        return self.evaluate.model_copy(update={"metrics": tuple(dict.fromkeys([*asked, *added]))})


def _read_version_1(text: Text, top: dict[str, Any], file: Path | None, base: Path) -> Recipe | None:
    # A missing version is reported already.
    document = read_block(text, Document, {"version": 1, **top}, ())
    parts = _Parts(text, top, base)
    for step in (
        *(_read_model, _read_data, _read_chain, _read_evaluate, _read_gates, _read_promote, _read_track),
        *(_check_model, _check_sources, _check_tasks, _check_baseline, _check_latency),
        *(_check_metrics, _check_gates, _check_promote),
    ):
        step(parts)
    if text.diagnostics or not (document and parts.model and parts.data and parts.stages):
        return None
    return Recipe(
        version=1,
        name=document.name,
        model=parts.model,
        data=parts.data,
        stages=parts.stages,
        baseline=parts.baseline,
        evaluate=parts.evaluate_with_gates(),
        gates=tuple(gate for _, gate in parts.gates),
        promote=parts.promote,
        file=file,
        base=base,
        against=tuple(gate for _, gate in parts.against),
        track=parts.track,
    )


READERS: Mapping[int, Callable[[Text, dict[str, Any], Path | None, Path], Recipe | None]] = {1: _read_version_1}
"""Schema version -> its reader. A new version is a new entry; an old recipe keeps its own."""


class GatesFile(Block):
    """A file that `compare --gates` reads."""

    gates: Annotated[list[Any], Field(min_length=1, max_length=MAX_GATES)]
    """Limits that the candidate must keep."""


def check_gates_file(text: Text, recipe: Recipe, *, candidate: str, over: str) -> Recipe:
    """The recipe with the gates of a file in place of its own; mistakes are in `text`."""
    top = text.value if isinstance(text.value, dict) else {}
    read_block(text, GatesFile, text.value, ())
    parts = _Parts(
        text, top, recipe.base, names=(candidate, over), leaves=(candidate,), baseline=over, evaluate=recipe.evaluate
    )
    parts.task = tasks.get(recipe.model.task)
    _read_gates(parts)
    _check_gates(parts)
    return replace(
        recipe, gates=tuple(gate for _, gate in parts.gates), evaluate=parts.evaluate_with_gates(), promote=None
    )


def _read_model(parts: _Parts) -> None:
    block = parts.top.get("model")
    if not isinstance(block, dict):
        return
    parts.model = read_block(parts.text, Model, block, ("model",))
    name = block.get("task")
    if isinstance(name, str):
        try:
            parts.task = tasks.get(name)
        except KeyError:
            parts.text.report(("model", "task"), f"no task is named `{name}`", did_you_mean(name, tasks.names()))


def _read_data(parts: _Parts) -> None:
    block = parts.top.get("data")
    if parts.task and isinstance(block, dict):
        parts.data = read_block(parts.text, parts.task.Data, block, ("data",))


def _read_chain(parts: _Parts) -> None:
    baseline = parts.top.get("baseline")
    parts.baseline = baseline if isinstance(baseline, str) else SOURCE
    format = "transformers" if _get(parts.top, "model", "module") is None else "pytorch"
    parts.stages, names = read_stages(parts.text, parts.top.get("stages"), format)
    parts.names = None if names is None else (SOURCE, *names)
    if parts.stages:
        parts.leaves = tuple(leaf.name for leaf in leaves_of(parts.stages, parts.baseline))


def _read_evaluate(parts: _Parts) -> None:
    block = parts.top.get("evaluate")
    if block is None:
        parts.evaluate = Evaluate()
    elif isinstance(block, dict):
        parts.evaluate = read_block(parts.text, Evaluate, block, ("evaluate",))


def _read_gates(parts: _Parts) -> None:
    parts.gates = _read_gate_list(parts, ("gates",), _gate_blocks(parts.top))
    against = parts.top.get("against")
    if isinstance(against, dict):
        read_block(parts.text, Against, against, ("against",))
        parts.against = _read_gate_list(parts, ("against", "gates"), _gate_blocks(against))


def _read_gate_list(parts: _Parts, trail: Trail, blocks: Sequence[Any]) -> tuple[tuple[int, Gate], ...]:
    read = [(index, read_block(parts.text, Gate, block, (*trail, index))) for index, block in enumerate(blocks)]
    place = parts.text.location
    return tuple((index, gate.placed(place((*trail, index)))) for index, gate in read if gate)


def _gate_blocks(top: Any) -> list[Any]:
    blocks = top.get("gates") if isinstance(top, dict) else None
    return blocks[:MAX_GATES] if isinstance(blocks, list) else []


def _read_promote(parts: _Parts) -> None:
    block = parts.top.get("promote")
    if isinstance(block, dict):
        parts.promote = read_block(parts.text, Promote, block, ("promote",))


def _read_track(parts: _Parts) -> None:
    parts.track = read_track(parts.text, parts.top.get("track"))


def _check_model(parts: _Parts) -> None:
    """That the task is ready to be done, and can be by a module of the user's own where that is the model."""
    task, module = parts.task, parts.model.module if parts.model else None
    if parts.model and module is None and parts.model.source is None:
        parts.text.report(("model",), "the key `source` is missing", key=True)
    if task is None:
        return
    if missing := [name for name in task.libraries if not installed(name)]:
        message = f"`{task.name}` needs {' and '.join(missing)}, not installed here"
        parts.text.report(("model", "task"), message, f'pip install "optimize-workbench[{task.extra}]"')
    if module is None:
        return
    if not task.plain_modules:
        known = [name for name in tasks.TASKS if tasks.get(name).plain_modules]
        message = f"a module of your own is no model for {task.name}"
        parts.text.report(("model", "module"), message, f"it can do {', '.join(known)}")
    package = module.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        hint = "install it, or name its folder in PYTHONPATH"
        parts.text.report(("model", "module"), f"Python finds no `{package}` to import", hint)


def _check_sources(parts: _Parts) -> None:
    """Files that are there, wheels and hub ids that can be ones."""
    from optimize.source import check as check_source

    data = _get(parts.top, "data", "source")
    model: Literal["model", "weights"] = "model" if _get(parts.top, "model", "module") is None else "weights"
    places: list[tuple[Literal["model", "weights", "data"], Trail, Any, Any]] = [
        (model, ("model", "source"), _get(parts.top, "model", "source"), _get(parts.top, "model", "revision")),
        ("data", ("data", "source"), data, _get(parts.top, "data", "revision")),
    ]
    splits = _get(parts.top, "data", "splits")
    for split, place in splits.items() if isinstance(splits, dict) else ():
        # Beside a source a plain word may be the name of a split that the hub knows.
        if isinstance(place, str) and not (data is not None and place.isidentifier()):
            places.append(("data", ("data", "splits", split), place, None))
    for kind, trail, place, revision in places:
        known = revision if isinstance(revision, str) else None
        if isinstance(place, str) and (message := check_source(place, parts.base, kind, known)):
            parts.text.report(trail, message)
    for stage in parts.stages or ():
        for field in stage.entry.sources:
            named = getattr(stage.config, field)
            if named is not None and (message := check_source(named, parts.base, "model")):
                parts.text.report(("stages", stage.index, field), message)


def _get(top: Mapping[str, Any], block: str, key: str) -> Any:
    """A value as written: a mistake elsewhere in its block is no reason to be silent about this one."""
    found = top.get(block)
    return found.get(key) if isinstance(found, dict) else None


def _check_tasks(parts: _Parts) -> None:
    """Stages that do nothing for models of this task."""
    for stage in parts.stages or ():
        if parts.task is None:
            continue
        settings = [value for _, value in stage.config if isinstance(value, str)]
        cases = [parts.task.name, *(f"{parts.task.name} {setting}" for setting in settings)]
        if reason := next((stage.entry.refuses[case] for case in cases if case in stage.entry.refuses), None):
            message = f"`{stage.verb}: {stage.method}` takes no model for {parts.task.name}: {reason}"
            parts.text.report(("stages", stage.index, stage.verb), message, key=True)


def _check_baseline(parts: _Parts) -> None:
    _check_stage_name(parts, parts.baseline, ("baseline",))


def _check_stage_name(parts: _Parts, name: str, trail: Trail) -> bool:
    if parts.names is None or name in parts.names:
        return True
    parts.text.report(trail, f"no stage is named `{name}`", did_you_mean(name, parts.names))
    return False


def _check_latency(parts: _Parts) -> None:
    """A language model is timed by `prefill` and `decode`, any other by `batch_sizes` and, but for images,
    `sequence_length`.
    """
    latency = _get(parts.top, "evaluate", "latency")
    if parts.task is None or not isinstance(latency, dict):
        return
    known = " and ".join(f"`{key}`" for key in Latency.settings_of(parts.task))
    for key in latency:
        if key in Latency.senseless(parts.task):
            message = f"`{key}` does not apply to {parts.task.name}"
            parts.text.report(("evaluate", "latency", key), message, f"its speed is measured at {known}", key=True)


def _check_metrics(parts: _Parts) -> None:
    metrics = _get(parts.top, "evaluate", "metrics")
    if not metrics and parts.task and parts.data:
        for metric in parts.task.default_metrics:
            if fault := parts.task.metric_fault(metric, parts.data):
                parts.text.report(("evaluate",), *fault)
    for index, metric in enumerate(metrics[:MAX_GATES] if isinstance(metrics, list) else ()):
        trail = ("evaluate", "metrics", index)
        if metric in MEASURED:
            parts.text.report(trail, f"`{metric}` is no metric of the task", "leave it out: it is measured anyway")
        elif isinstance(metric, str):
            _check_metric(parts, metric, trail)


def _check_metric(parts: _Parts, metric: str, trail: Trail) -> bool:
    """Whether the metric will be measured. A task's metric that only a gate names is added to those asked for."""
    if fault := measure_fault(metric, parts.task, parts.evaluate):
        parts.text.report(trail, *fault)
        return False
    if parts.task and parts.data and (fault := parts.task.metric_fault(metric, parts.data)):
        parts.text.report(trail, *fault)
        return False
    if parts.task is None or metric in MEASURED or metric in parts.task.metrics or USER_METRIC.fullmatch(metric):
        return True
    if metric in _installed_metrics():
        return True
    known = [*parts.task.metrics, *measured_of(parts.task), *_installed_metrics()]
    parts.text.report(trail, f"nothing measures `{metric}`", did_you_mean(metric, known))
    return False


@cache
def _installed_metrics() -> tuple[str, ...]:
    return tuple(point.name for point in entry_points(group="optimize.metrics"))


def _check_gates(parts: _Parts) -> None:
    _check_gate_list(parts, ("gates",), _gate_blocks(parts.top), dict(parts.gates), parts.baseline)
    # Over what is promoted nothing can be compared with itself: that is no stage of the recipe.
    _check_gate_list(parts, ("against", "gates"), _gate_blocks(parts.top.get("against")), dict(parts.against), None)


def _check_gate_list(
    parts: _Parts, at: Trail, blocks: Sequence[Any], sound: Mapping[int, Gate], baseline: str | None
) -> None:
    for index, block in enumerate(blocks):
        if not isinstance(block, dict):
            continue
        trail = (*at, index)
        metric = block.get("metric")
        measured = isinstance(metric, str) and _check_metric(parts, metric, (*trail, "metric"))
        named = _check_gate_names(parts, trail, block)
        if gate := sound.get(index):
            if measured and (fault := limit_fault(gate, parts.task)):
                parts.text.report((*trail, gate.limit[0]), *fault, key=True)
            if named:
                _check_comparison(parts, trail, gate, baseline)


def _check_gate_names(parts: _Parts, trail: Trail, block: dict[str, Any]) -> bool:
    on, over = block.get("on"), block.get("over")
    places: list[tuple[Any, Trail]] = [(over, (*trail, "over")), (on, (*trail, "on"))]
    if isinstance(on, list):
        places[1:] = [(name, (*trail, "on", position)) for position, name in enumerate(on)]
    known = [_check_stage_name(parts, name, place) for name, place in places if isinstance(name, str)]
    return all(known)


def _check_comparison(parts: _Parts, trail: Trail, gate: Gate, baseline: str | None) -> None:
    """A relative limit compares two things, an absolute one none."""
    limit, _ = gate.limit
    over = baseline if gate.over is None else gate.over
    if limit not in RELATIVE:
        if gate.over is not None:
            message = f"`{limit}` compares with nothing, so `over` says nothing"
            parts.text.report((*trail, "over"), message, "leave it out")
        return
    named = (gate.on,) if isinstance(gate.on, str) else gate.on
    # Without `on` every leaf but `over` itself is judged.
    if over in named if named else parts.leaves == (over,):
        parts.text.report(trail, f"this gate compares `{over}` with itself", "change `on` or `over`")


def _check_promote(parts: _Parts) -> None:
    select = _get(parts.top, "promote", "select")
    if isinstance(select, str):
        _check_metric(parts, select, ("promote", "select"))
    elif parts.promote and parts.leaves and len(parts.leaves) > 1:
        names = ", ".join(f"`{name}`" for name in parts.leaves)
        parts.text.report(("promote",), f"several leaves could pass: {names}", "choose the best: `select: METRIC`")
    if parts.promote and parts.leaves and not any(_judges_a_leaf(gate, parts.leaves) for _, gate in parts.gates):
        message = "nothing could ever be promoted: no gate judges the end of the chain, so there is no verdict on it"
        parts.text.report(("promote",), message, "add `gates`", key=True)


def _judges_a_leaf(gate: Gate, leaves: Sequence[str]) -> bool:
    named = (gate.on,) if isinstance(gate.on, str) else gate.on
    return named is None or not set(leaves).isdisjoint(named)
