"""Experiment trackers: what a run found, sent to where people already look.

    track: mlflow

    track:
      to: mlflow
      uri: http://127.0.0.1:5000
      experiment: sentiment

    track: [tensorboard, {to: wandb, project: sentiment}]

It is no part of any key, nor of the recipe's digest, and changes no verdict and no exit code. Each tracker is a file:
its `Config` is the schema of the block, and its `send` hands a run's `Content` over by the tracker's own library. That
happens in a process of its own that has a time limit: libraries that hang, print, retry for minutes or leave threads
behind do none of it to the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from optimize.track.settings import Settings

if TYPE_CHECKING:
    from optimize.progress import Progress
    from optimize.track.content import Content


class Sender(Protocol):
    """What a tracker's file holds."""

    Config: type[Settings]
    """What the recipe's block may say beside `to`."""

    def send(self, content: Content, config: Any, base: Path) -> str:
        """Hand a run over, and say where it is now. Sent once more it replaces what was sent. `base` is the folder that
        relative paths start from. Raises whatever the library raises."""


@dataclass(frozen=True)
class Tracker:
    """A tracker there is."""

    name: str
    libraries: tuple[str, ...]
    """Distributions of which one has to be installed."""

    @property
    def extra(self) -> str:
        return self.name

    def load(self) -> Sender:
        return cast(Sender, import_module(f"optimize.track.{self.name}"))


TRACKERS: Mapping[str, Tracker] = {
    one.name: one
    for one in (
        Tracker("mlflow", ("mlflow", "mlflow-skinny")),
        Tracker("tensorboard", ("tensorboard",)),
        Tracker("wandb", ("wandb",)),
    )
}


@dataclass(frozen=True)
class Target:
    """A tracker, and what a recipe says of it."""

    to: str
    config: Settings

    def document(self) -> dict[str, Any]:
        """The block as JSON."""
        return {"to": self.to, **self.config.model_dump(mode="json")}


def send_all(targets: Sequence[Target], folder: Path, progress: Progress) -> None:
    """Send a run that is on the disk to each tracker. Nothing is raised: what goes wrong is told."""
    from optimize.errors import TrackingError
    from optimize.track.sending import send

    for target in targets:
        name, began = f"track {target.to}", time.perf_counter()
        progress.start(name, "sending the run")
        try:
            where = send(folder, target)
        except (TrackingError, OSError) as error:  # the second where no process can be started
            progress.fail(name)
            progress.warn(name, f"{error}; `optimize track {folder.name}` sends it again")
        else:
            progress.finish(name, seconds=time.perf_counter() - began, text=where)
