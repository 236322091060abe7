"""`optimize gate`: a recipe's candidate against what is promoted now, both measured here and now.

Nothing that was measured before takes part: the promoted artifact's answers and times are taken in this run, its times
in the very rounds of the candidate's. `limits` says which gates decide, `acknowledged` which regressions are let pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError
from optimize.gating import acknowledged
from optimize.gating.changes import changed
from optimize.gating.limits import gates_over
from optimize.gating.promoted import Rival, bring, check_reference, describe, find

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.progress import Progress
    from optimize.recipe import Recipe
    from optimize.run import Run
    from optimize.scoring import Subject
    from optimize.work import Work


def gate(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    against: str,
    since: Sequence[str] = (),
    remote: str | None = None,
    acknowledgements: str | os.PathLike[str] | None = None,
    work: Work | str | Path | None = None,
    overrides: Sequence[str] = (),
    promote: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Apply a recipe and judge its candidate over what `against` names (`minilm-sentiment@production`).

    `since` are older versions that must not have been left further behind either, such as `production~5`. The artifact
    comes from `remote` where the store lacks it. `acknowledgements` is a file of regressions that are let pass; the
    default is `acknowledged.yaml` beside the recipe. `promote` promotes what passes, here and by the recipe's own
    gates; what passed by an acknowledgement is logged under a waiver. Where nothing is promoted yet, the recipe's own
    gates decide, and `run.document["against"]["version"]` is None.

    Raises as `apply` and `pull` do.
    """
    from optimize.engine import Rivals, carry_out
    from optimize.planning import as_recipe, as_work
    from optimize.progress import Progress
    from optimize.remote.fetching import refresh
    from optimize.remote.settings import find_remote
    from optimize.run import Clock, Run, new_document, recording

    clock = Clock()
    for reference in (against, *(one for one in since if "@" in one)):
        check_reference(reference)
    recipe = as_recipe(recipe, overrides)
    if promote and recipe.promote is None:
        raise RecipeError("the recipe does not say what to promote to", hint="add `promote: {alias: production}`")
    if not recipe.gates and not recipe.against:
        raise RecipeError("the recipe has no gates, so there is nothing to judge", hint="add `gates`, or `against`")
    work = as_work(work)
    progress = progress or Progress()
    document = new_document(recipe)
    sidecars: dict[str, Path] = {}
    with work.store.in_use(), _fresh(work) as measuring, recording(work, recipe, document, sidecars, clock, progress):
        place = find_remote(work, remote)
        if place is not None:
            refresh(work, place)
        found = find(work, against, since, recipe)
        document["against"] = describe(against, found)
        names = [rival.name for rival in found.rivals]
        gates = gates_over(recipe, names) if names else recipe.gates
        if promote:  # what is promoted has to keep what `apply` asks as well
            gates = tuple(dict.fromkeys([*gates, *recipe.gates]))
        if names and not any(one.over in names for one in gates):
            document["against"]["notes"].append(
                f"no gate is judged over {names[0]}: give the recipe `against: {{gates: [...]}}`"
            )
        file = Path(acknowledgements) if acknowledgements is not None else None
        lines = acknowledged.read(recipe, gates, names, file)
        subjects = {
            rival.name: _subject(rival, bring(rival, work, place, trusted=trust_remote_code, progress=progress), work)
            for rival in found.rivals
        }
        if found.rivals:
            document["against"]["changed"] = _changed(document, recipe, found.rivals[0], work)

        def check(task: Any, spec: Mapping[str, Any]) -> None:
            from optimize.comparison import check_labels

            for subject in subjects.values():
                check_labels(subject.artifact, task, spec)

        rivals = Rivals(subjects, gates, measuring, lines.apply, lines.waiver, check)
        try:
            carry_out(
                *(recipe, work, progress, clock, document, sidecars), remeasure=False, promote=promote, rivals=rivals
            )
        finally:
            document["acknowledgements"] = lines.states()
        if found.rivals:  # the rows are known by now
            document["against"]["changed"] = _changed(document, recipe, found.rivals[0], work)
    return Run(document, work.runs / document["run"], work)


@contextlib.contextmanager
def _fresh(work: Work) -> Iterator[Work]:
    """The work folder with no measurement in it; what is taken there goes with it, since run.json holds what counts."""
    from optimize.work import Work

    folder = work.store.staging()  # `gc` sweeps it where this process is killed
    try:
        yield Work(work.root, scores=folder)
    finally:
        work.store.discard(folder)


def _subject(rival: Rival, artifact: Artifact, work: Work) -> Subject:
    """The promoted artifact under its name, with the stage that made it where that is known."""
    from optimize.remote.fetching import run_document
    from optimize.scoring import Subject

    document = run_document(work, rival.version.run)
    listed = document.get("artifacts") if isinstance(document, Mapping) else None
    known = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    made = (one.get("stage") for one in known if one.get("digest") == artifact.digest)
    stage = next((stage for stage in made if isinstance(stage, str)), artifact.format)
    return Subject(artifact, stage=stage[:100], cached=True)


def _changed(document: Mapping[str, Any], recipe: Recipe, rival: Rival, work: Work) -> dict[str, Any]:
    from optimize.remote.fetching import run_document

    run = rival.version.run
    return changed(document, recipe, run_document(work, run), run_document(work, run, "recipe.json"))
