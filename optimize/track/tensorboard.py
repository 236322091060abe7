"""Writes runs for TensorBoard: a folder a run, with scalars, the verdict and the gates as text, and the parameters for
its page HPARAMS.

    track:
      to: tensorboard
      folder: ../tensorboard         # by default `tensorboard` in the work folder

and then `tensorboard --logdir .optimize/tensorboard`.

Source: https://docs.pytorch.org/docs/stable/tensorboard.html
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.track.settings import Settings

if TYPE_CHECKING:
    from optimize.track.content import Content


class Config(Settings):
    """Where the run goes."""

    folder: str | None = None
    """The folder that TensorBoard is started on, from the recipe's; by default `tensorboard` in the work folder."""


def send(content: Content, config: Config, base: Path) -> str:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard import summary as written

    # The run lies in `runs` of the work folder.
    root = base / config.folder if config.folder else content.folder.absolute().parent.parent / "tensorboard"
    place = root / content.recipe_name / content.run
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    began = content.began_ms / 1000
    with SummaryWriter(str(place)) as writer:
        for name, value in content.metrics.items():
            writer.add_scalar(name, value, 0, walltime=began)
        for point in content.curves:
            writer.add_scalar(point.name, point.value, point.step, walltime=began)
        for title, text in {"summary": content.note, **content.tags}.items():
            writer.add_text(title, text, 0, walltime=began)
        # `add_hparams` writes to a folder of its own, which would be a run of its own; this is what it writes.
        chosen = {name: content.metrics[name] for name in content.key_metrics}
        make_hparams: Any = written.hparams
        for summary in make_hparams(content.parameters, chosen):
            writer.file_writer.add_summary(summary)
    return str(place)
