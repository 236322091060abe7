"""`apply`: resolve, reuse or run each stage, score every artifact, judge the gates, promote what passed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import OptimizeError, RecipeError, StageError
from optimize.planning import Step, ancestors, as_recipe, as_work, decide, decide_source, resolve_config, sources
from optimize.progress import Progress, shown_in_notebooks
from optimize.recipe import SOURCE, Gate, Recipe, Stage
from optimize.run import Clock, Run, new_document, recording, write_run
from optimize.scoring import Judging, Scoring, Subject, describe_artifacts, describe_data, gated_pairs

if TYPE_CHECKING:
    from optimize.data import Data
    from optimize.evaluate.types import GateResult
    from optimize.registry import Waiver
    from optimize.store import Store
    from optimize.tasks import Task
    from optimize.work import Work


@shown_in_notebooks
def apply(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    work: Work | str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    remeasure: bool = False,
    promote: bool = True,
) -> Run:
    """Carry out a recipe (a path, a mapping, or a loaded `Recipe`) and return its `Run`.

    `remeasure` adds rounds of latency to those that are stored. `promote=False` leaves the registry alone.

    Raises `RecipeError` for anything that `validate` can see, `SourceError`, `StageError` or `EvaluationError` where
    the work fails; `run.json` then holds the error. A gate that fails raises nothing: see `Run.verdict`.
    """
    clock = Clock()
    recipe = as_recipe(recipe, overrides)
    work = as_work(work)
    progress = progress or Progress()
    document = new_document(recipe)
    sidecars: dict[str, Path] = {}
    with recording(work, recipe, document, sidecars, clock, progress), work.store.in_use():
        carry_out(recipe, work, progress, clock, document, sidecars, remeasure=remeasure, promote=promote)
    return Run(document, work.runs / document["run"], work)


def build(recipe: Recipe, name: str, work: Work, progress: Progress) -> tuple[Artifact, Data]:
    """The artifact of one stage (or of the source), made or reused with those it needs, and the rows of the recipe.

    Nothing is scored, and no run is recorded. Raises as `apply` does.
    """
    from optimize.data import prepare

    task = tasks.get(recipe.model.task)
    data = prepare(recipe.data, task, work, recipe.base)
    needed = {name}
    for stage in reversed(recipe.stages):
        needed.update(ancestors(stage) if stage.name in needed else ())
    with work.store.in_use():
        built = {SOURCE: _take_source(recipe, work.store, task, data, progress)}
        source = built[SOURCE].artifact
        if not task.check_source(source.path, source.task):
            _refuse_fresh_head(recipe, ())
        for stage in recipe.stages:
            if stage.name in needed:
                logs = work.root / "logs"
                built[stage.name] = _build(recipe, stage, work.store, task, data, built, logs, progress)
    return built[name].artifact, data


@dataclass(frozen=True)
class Rivals:
    """What a recipe's artifacts are measured beside, and gated over, besides each other."""

    subjects: Mapping[str, Subject]
    gates: tuple[Gate, ...]
    """Judged in place of the recipe's."""
    measuring: Work
    """Where measurements are kept."""
    acknowledge: Callable[[Judging, list[GateResult]], list[GateResult]]
    waiver: Callable[[], Waiver | None]
    """What a promotion has to say of the acknowledged results, once all are judged."""
    check: Callable[[Task, Mapping[str, Any]], None]
    """Raises `EvaluationError` where a rival can't be scored on the recipe's rows."""


def carry_out(
    recipe: Recipe,
    work: Work,
    progress: Progress,
    clock: Clock,
    document: dict[str, Any],
    sidecars: dict[str, Path],
    *,
    remeasure: bool,
    promote: bool,
    rivals: Rivals | None = None,
) -> None:
    """Fill in `document` (a run.json) as the work goes on, so that an error leaves what was reached."""
    from optimize.data import prepare
    from optimize.evaluate.evaluation import task_metrics
    from optimize.evaluate.gates import exit_code_of, select_leaf, verdict_of

    task = tasks.get(recipe.model.task)
    task_metrics(task, recipe.evaluate.metrics)  # one that can't be imported is said now, not after hours of training
    leaves = [stage.name for stage in recipe.leaves]
    logs = work.runs / document["run"] / "logs"
    judged_by = replace(recipe, gates=rivals.gates) if rivals else recipe
    compared = {recipe.baseline, *itertools.chain(*gated_pairs(judged_by.gates, leaves, recipe.baseline))}
    with clock.on("sources"):
        data = prepare(recipe.data, task, work, recipe.base)
        document["data"] = describe_data(data)
        if rivals:
            rivals.check(task, task.spec(recipe.data, data.info))
        built = {SOURCE: _take_source(recipe, work.store, task, data, progress)}
        source = built[SOURCE].artifact
        if not task.check_source(source.path, source.task):
            _refuse_fresh_head(recipe, compared)
    for stage in recipe.stages:
        with clock.on("stages"):
            built[stage.name] = _build(recipe, stage, work.store, task, data, built, logs, progress)
        subjects = {name: subject for name, subject in built.items() if name != SOURCE or SOURCE in compared}
        document["artifacts"] = describe_artifacts(subjects, source)
    with clock.on("scoring"):
        scoring = Scoring(judged_by, data, work, progress, remeasure, document, sidecars)
        if rivals:
            subjects = {**subjects, **rivals.subjects}
            document["artifacts"] = describe_artifacts(subjects, source)
            scoring = replace(scoring, work=rivals.measuring, acknowledge=rivals.acknowledge)
        evaluation, results = scoring.score(subjects, baseline=recipe.baseline, leaves=leaves)
        chosen = leaves[0] if len(leaves) == 1 else None
        if recipe.promote and recipe.promote.select and len(leaves) > 1:
            chosen = select_leaf(recipe.promote.select, evaluation, results, leaves)
            if chosen:
                confirmed = scoring.confirm(subjects, chosen, leaves=leaves)
                results = [result for result in results if result.artifact not in leaves] + confirmed
    document["verdict"] = verdict_of(results)
    document["exit_code"] = exit_code_of(results)
    if chosen:
        document["selected"] = built[chosen].artifact.digest
        judged = verdict_of([result for result in results if result.artifact == chosen])
        if promote and recipe.promote and document["verdict"] == judged == "pass":
            write_run(work, recipe, document, sidecars)  # the registry never names a run that is not on the disk
            waiver = rivals.waiver() if rivals else None
            _promote(recipe, recipe.promote.alias, built[chosen].artifact, work, results, document, waiver)


def _promote(
    recipe: Recipe,
    alias: str,
    artifact: Artifact,
    work: Work,
    results: Sequence[GateResult],
    document: dict[str, Any],
    waiver: Waiver | None,
) -> None:
    version = work.registry.promote(
        recipe.name,
        alias,
        artifact.digest,
        # What is acknowledged has not passed: the audit log has it as a waiver.
        verdict="fail" if waiver else document["verdict"],
        waiver=waiver,
        run=document["run"],
        recipe_digest=recipe.digest,
        gates=[result.to_json() for result in results],
    )
    document["promoted"] = {"alias": alias, "version": version.version, "digest": version.digest}


def _take_source(recipe: Recipe, store: Store, task: Task, data: Data, progress: Progress) -> Subject:
    """The source model as an artifact of the store."""
    from optimize.source import resolve_model

    progress.start(SOURCE, recipe.model.source or recipe.model.module or "")
    source = resolve_model(recipe.model, recipe.base)
    step = decide_source(store, recipe, source, task.spec(recipe.data, data.info))

    def take(directory: Path) -> Artifact:
        source.copy_to(directory)
        task.check_source(directory, step.inputs["task"])  # before it is stored
        return Artifact.from_directory(
            directory,
            format=recipe.model.format,
            task=step.inputs["task"],
            trust_remote_code=recipe.model.runs_code,
        )

    return _reuse_or_make(recipe, step, store, progress, take, parent=None)


def _build(
    recipe: Recipe,
    stage: Stage,
    store: Store,
    task: Task,
    data: Data,
    built: Mapping[str, Subject],
    logs: Path,
    progress: Progress,
) -> Subject:
    """Reuse a stage's artifact, or run the stage."""
    known = {name: built[name].artifact for name in ancestors(stage)}
    progress.start(stage.name, stage.id)
    step = decide(store, recipe, stage, known, data)

    def run(directory: Path) -> Artifact:
        assert step.key is not None
        context = Context(
            directory=directory,
            scratch=store.scratch(step.key),
            task=task,
            data=data.for_stages(),
            logs=logs / stage.name,
            stage=stage.name,
            artifacts=known,
            sources=sources(recipe, stage),
            progress=progress,
        )
        with _stage_errors(stage), contextlib.redirect_stdout(sys.stderr):
            return stage.entry.load().run(known[stage.parent], resolve_config(stage.config), context)

    return _reuse_or_make(recipe, step, store, progress, run, parent=stage.parent)


def _reuse_or_make(
    recipe: Recipe, step: Step, store: Store, progress: Progress, make: Callable[[Path], Artifact], parent: str | None
) -> Subject:
    """Reuse the artifact of a key after checking its bytes, or make it; one process works, the others wait for it."""
    began = time.perf_counter()
    assert step.key is not None
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, *_: progress.fail(step.name) if kind else None)
        artifact = step.artifact
        if artifact is None:
            waiting = lambda: progress.update(step.name, 0, 0, "another run is making it")  # noqa: E731
            stack.enter_context(store.lock(step.key, on_wait=waiting))
            artifact = store.get(step.key)
        cached = artifact is not None
        if artifact is not None:
            store.verify(artifact)
        else:
            directory = store.staging()
            stack.callback(store.discard, directory)
            made = make(directory)
            record = {
                "inputs": dict(step.inputs),
                "recipe": recipe.name,
                "stage": step.name,
                "id": step.id,
                "parent": step.inputs.get("parent"),
                "seconds": round(time.perf_counter() - began, 3),
                "size_bytes": made.size_bytes,
            }
            artifact = store.publish(step.key, made, record)
    seconds = time.perf_counter() - began
    progress.finish(step.name, seconds=seconds, cached=cached, text="" if cached else step.why)
    return Subject(artifact, step.id, parent, step.key, cached, seconds)


@contextlib.contextmanager
def _stage_errors(stage: Stage) -> Iterator[None]:
    """Whatever goes wrong in a stage is said as that stage's error."""
    where = {"stage": stage.name, "location": stage.location}
    try:
        yield
    except OptimizeError as error:
        error.stage = error.stage or stage.name
        error.location = error.location or stage.location
        raise
    except MemoryError as error:
        raise StageError(
            "out of memory", **where, hint="a smaller batch_size, or a machine with more memory"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StageError(
                "the disk is full", **where, hint="free space, or `optimize store gc`, then run again"
            ) from error
        raise StageError(f"{type(error).__name__}: {error}", **where) from error
    except (Exception, SystemExit) as error:  # a library that exits must not end the run as if all were well
        raise StageError(f"{type(error).__name__}: {error}", **where) from error


def _refuse_fresh_head(recipe: Recipe, compared: Collection[str]) -> None:
    """A head made of random numbers can neither be exported nor stand for a trained model."""
    for stage in recipe.stages:
        if stage.parent == SOURCE and stage.verb != "distill":
            raise RecipeError(
                f"the source model has no head for {recipe.model.task} yet, and `{stage.verb}` can't train one",
                stage=stage.name,
                location=stage.location,
                hint="put `- distill: finetune` before it",
            )
        if SOURCE in stage.reads:
            raise RecipeError(
                f"the source model has no trained head for {recipe.model.task}, so there is nothing to learn from it",
                stage=stage.name,
                location=stage.location,
                hint="train it first with `distill: finetune`, and name that stage",
            )
    if SOURCE in compared:
        raise RecipeError(
            f"the source model has no trained head for {recipe.model.task}, so it is no baseline",
            hint=f"name a trained stage, such as `baseline: {recipe.stages[0].name}`",
        )
