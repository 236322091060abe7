"""`compare`: two artifacts side by side, with the statistics of `apply` and, where gates are given, its verdict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import tasks
from optimize.errors import EvaluationError, RecipeError
from optimize.evaluate.gates import exit_code_of, verdict_of
from optimize.model import find_artifact
from optimize.planning import as_work
from optimize.progress import Progress, shown_in_notebooks
from optimize.recipe import Recipe
from optimize.remote.fetching import bring
from optimize.run import Clock, Run, new_document, recipe_of, recording, run_documents
from optimize.scoring import Scoring, Subject, describe_artifacts, describe_data

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.tasks import Task
    from optimize.work import Work

CANDIDATE, OVER = "candidate", "baseline"
"""The names of the two in `run.json` and in a gates file."""


@shown_in_notebooks
def compare(
    candidate: str | Path,
    over: str | Path,
    *,
    work: Work | str | Path | None = None,
    recipe: str | os.PathLike[str] | None = None,
    gates: str | os.PathLike[str] | None = None,
    remote: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    remeasure: bool = False,
) -> Run:
    """Hold one artifact against another; each is a digest, `name@alias` (`name@alias~2` for an older one),
    `name@version` or the path of a folder. What the store lacks comes from `remote`.

    Rows and settings are those of `recipe`; without it, of the newest run that holds one of the two. `gates` is a YAML
    file with a `gates` list, judged on the candidate; without it there is no verdict.

    Raises `StoreError` for a reference that names nothing or damaged bytes, `RecipeError` where no recipe is known,
    `EvaluationError` where the two do not do the same task, and `SourceError` where the rows' labels are not theirs.
    """
    from optimize.data import prepare

    clock = Clock()
    work = as_work(work)
    sidecars: dict[str, Path] = {}
    with work.store.in_use():
        bring((candidate, over), work, remote, trusted=trust_remote_code, progress=progress)
        pair = {CANDIDATE: find_artifact(candidate, work), OVER: find_artifact(over, work)}
        check_same_task(pair)
        judged = _judged_by(pair, work, recipe, gates)
        document = new_document(judged)
        document["compared"] = {CANDIDATE: str(candidate), OVER: str(over)}
        subjects = {name: Subject(artifact, stage=artifact.format, cached=True) for name, artifact in pair.items()}
        document["artifacts"] = describe_artifacts(subjects, source=pair[OVER])
        with recording(work, judged, document, sidecars, clock, progress):
            task = tasks.get(judged.model.task)
            with clock.on("sources"):
                data = prepare(judged.data, task, work, judged.base)
                check_labels(pair[CANDIDATE], task, task.spec(judged.data, data.info))
            document["data"] = describe_data(data)
            with clock.on("scoring"):
                scoring = Scoring(judged, data, work, progress or Progress(), remeasure, document, sidecars)
                _, results = scoring.score(subjects, baseline=OVER, leaves=[CANDIDATE])
            document["verdict"] = verdict_of(results)
            document["exit_code"] = exit_code_of(results)
            document["selected"] = pair[CANDIDATE].digest
    return Run(document, work.runs / document["run"], work)


def check_same_task(pair: Mapping[str, Artifact]) -> None:
    one, other = (dict(artifact.task) for artifact in pair.values())
    for field in ("name", "labels"):
        if one.get(field) != other.get(field):
            raise EvaluationError(
                f"the two can't be compared: {field} is {one.get(field)!r} in one and {other.get(field)!r} in the other"
            )


def check_labels(artifact: Artifact, task: Task, spec: Mapping[str, Any]) -> None:
    """Rows whose labels stand in another order than the model's would be scored without a word, and wrongly."""
    if artifact.task["name"] != spec["name"]:
        raise EvaluationError(
            f"the two are models for {artifact.task['name']}, and the rows are for {spec['name']}",
            hint="name a recipe for the same task: --recipe recipe.yaml",
        )
    if artifact.task.get("labels") != spec.get("labels"):
        task.check_source(artifact.path, spec)


def _judged_by(
    pair: Mapping[str, Artifact],
    work: Work,
    recipe: str | os.PathLike[str] | None,
    gates: str | os.PathLike[str] | None,
) -> Recipe:
    """The recipe whose rows, settings and gates decide."""
    from optimize.recipe import load, with_gates

    if recipe is not None:
        base = load(recipe)
    else:
        digests = {artifact.digest for artifact in pair.values()}
        held = (
            folder
            for folder, document in run_documents(work)
            if "compared" not in document and digests & {described["digest"] for described in document["artifacts"]}
        )
        folder = next(held, None)
        if folder is None:
            raise RecipeError(
                "no run in the work folder holds either of the two, so it is not known which rows to compare them on",
                hint="name a recipe whose `data` and `evaluate` to use: --recipe recipe.yaml",
            )
        base = recipe_of(folder)
    return with_gates(base, gates, stages=(CANDIDATE, OVER), baseline=OVER)
