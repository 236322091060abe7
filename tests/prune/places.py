"""A pico model, and rooms for stages that work on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.progress import Progress
from optimize.work import Work

SPLITS = {"train": 0.4, "validation": 0.2, "calibration": 0.2, "evaluation": 0.2}
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "threads": 1, "device": "cpu"}


@dataclass(frozen=True)
class Place:
    """A model, and how to make rooms for stages that work on it."""

    artifact: Artifact
    room: Callable[..., Context]

    def load(self, artifact: Artifact | None = None) -> Any:
        one = artifact or self.artifact
        task = tasks.get(one.task["name"])
        return task.load_model(one.path, one.task, trust_remote_code=one.trust_remote_code)


def place(artifact: Artifact, source: Path, factory: pytest.TempPathFactory, **data: Any) -> Place:
    task = tasks.get(artifact.task["name"])
    config = task.Data(source=str(source), splits=SPLITS, **data)
    prepared = prepare(config, task, Work(factory.mktemp("rows")), source.parent)
    rows = prepared.for_stages()

    def room(scratch: Path | None = None, progress: Progress | None = None) -> Context:
        directory, scratch = factory.mktemp("artifact"), scratch or factory.mktemp("scratch")
        return Context(directory, scratch, task, rows, scratch / "logs", stage="stage", progress=progress or Progress())

    spec = task.spec(config, prepared.info)
    made = Artifact.from_directory(
        artifact.path, format=artifact.format, task=spec, trust_remote_code=artifact.trust_remote_code
    )
    return Place(made, room)
