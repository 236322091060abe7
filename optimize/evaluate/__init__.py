"""Scoring: every artifact as it would ship, through the runtime that would serve it, on rows that no stage has seen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from optimize.evaluate.evaluation import Evaluation, Measure
from optimize.evaluate.types import CONFIDENCE, Comparison, GateResult

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.data import Data
    from optimize.progress import Progress
    from optimize.recipe import Evaluate
    from optimize.tasks import Task
    from optimize.work import Work

__all__ = ["CONFIDENCE", "Comparison", "Evaluation", "GateResult", "Measure", "evaluate"]


def evaluate(
    subjects: Mapping[str, Artifact],
    *,
    parents: Mapping[str, str],
    baseline: str,
    task: Task,
    data: Data,
    settings: Evaluate,
    work: Work,
    progress: Progress,
    pairs: Sequence[tuple[str, str]] = (),
    remeasure: bool = False,
    again: bool = False,
) -> Evaluation:
    """Score artifacts by name, or take what was measured before of the same files, rows, settings and host.

    `parents` and `baseline` say what each is held against; `pairs` are further (candidate, over) that gates compare.
    `remeasure` adds rounds of latency and memory to the stored ones. `again` takes none that were measured without it:
    what was picked for its times has to show them once more. Raises `EvaluationError`, naming the artifact, where one
    can't be measured.
    """
    began = time.perf_counter()
    progress.start("scores", ", ".join(subjects))
    try:
        evaluation = Evaluation(
            subjects,
            parents=parents,
            baseline=baseline,
            task=task,
            data=data,
            settings=settings,
            work=work,
            progress=progress,
            pairs=pairs,
            again=again,
        )
        evaluation.measure(remeasure=remeasure)
    except BaseException:
        progress.fail("scores")
        raise
    progress.finish("scores", seconds=time.perf_counter() - began, cached=evaluation.reused)
    return evaluation
