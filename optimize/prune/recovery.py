"""Between steps of pruning: a short training, and the model on the disk, so that a killed stage goes on behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.artifact import Artifact, sync_tree
from optimize.distill.finetune import with_loss
from optimize.distill.training import Training, train, training
from optimize.errors import StageError
from optimize.planning import resolve_config
from optimize.prune import saving

if TYPE_CHECKING:
    from optimize.context import Context

_REPORT = "report.json"


class Recovery(Training):
    """A training after a cut: the fields of `distill: finetune`."""


@dataclass
class Step:
    """What is done so far: 0 is the model that came."""

    number: int
    artifact: Artifact
    report: dict[str, Any]
    """For the manifest."""


def last_step(source: Artifact, context: Context) -> Step:
    """Where an earlier run of this stage was cut off, or the beginning."""
    reports = {int(path.parent.name.rpartition("-")[2]): path for path in context.scratch.glob(f"step-*/{_REPORT}")}
    if not reports:
        return Step(0, source, {})
    number = max(reports)
    artifact = described(source, reports[number].parent / "model")
    return Step(number, artifact, json.loads(reports[number].read_text(encoding="utf-8")))


def keep(step: Step, model: Any, context: Context) -> None:
    """Put a step on the disk in place of the one before."""
    folder = context.scratch / f"step-{step.number}"
    atomic.remove(folder)
    saved(model, step.artifact, folder / "model", context)
    sync_tree(folder)
    atomic.write_json(folder / _REPORT, step.report)  # without it the step is not complete
    atomic.remove(context.scratch / f"step-{step.number - 1}")


def saved(model: Any, source: Artifact, folder: Path, context: Context) -> Artifact:
    """A model on its way, as an artifact that loads; its config.json says what it said before."""
    folder.mkdir(parents=True)
    saving.copy_preprocessor(source, context, folder)
    saving.save(model, source, folder, {})
    return described(source, folder)


def described(source: Artifact, folder: Path) -> Artifact:
    """A folder as an artifact of the kind that the source is."""
    return Artifact.from_directory(
        folder, format=source.format, task=source.task, trust_remote_code=source.trust_remote_code
    )


def recover(
    model: Any, settings: Recovery, source: Artifact, context: Context, number: int
) -> tuple[Any, dict[str, Any]]:
    """(the model after a training, what is told of that). It goes on from its own last checkpoint."""
    settings = resolve_config(settings)
    scratch = context.scratch / f"recovery-{number}"
    scratch.mkdir(exist_ok=True)
    preprocessor = context.task.preprocessor(source.path, trust_remote_code=source.trust_remote_code)
    plain = hasattr(model, "config")
    context = replace(context, scratch=scratch)
    with training(settings, context):
        trained, details = train(model if plain else with_loss(model), preprocessor, source.task, settings, context)
    atomic.remove(scratch)
    return (trained if plain else trained.module).eval(), details


def check_trainable(settings: Recovery | None, context: Context) -> None:
    """Raises `StageError` where rows of this task say nothing that a loss could be of."""
    if settings is not None and context.task.name == "sentence-similarity":
        raise StageError("recovery trains on labels, which rows of sentence-similarity have none of")
