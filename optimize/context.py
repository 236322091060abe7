"""What a stage is given besides its input artifact and its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.data import Data
    from optimize.source import SourceModel
    from optimize.tasks import Task


@dataclass(frozen=True)
class Context:
    """The room a stage works in."""

    directory: Path
    """An empty folder: the files of the new artifact go here."""
    scratch: Path
    """A folder of this very work (its key) that survives a kill: checkpoints of what can resume."""
    task: Task
    data: Data
    """Rows for the stage; the evaluation split is refused here."""
    logs: Path
    """A folder of the run for this stage's training curves and the like; made by whoever writes there."""
    stage: str = ""
    """The stage's name in the recipe."""
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """Artifacts of other stages that the config names (`teacher`), by stage name."""
    sources: Mapping[str, SourceModel] = field(default_factory=dict)
    """Models elsewhere that the config names, by field; `copy_to(folder)` fetches one."""
    progress: Progress = field(default_factory=Progress)

    def update(self, done: float, total: float, text: str = "") -> None:
        self.progress.update(self.stage, done, total, text)

    def warn(self, message: str) -> None:
        self.progress.warn(self.stage, message)
