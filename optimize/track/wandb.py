"""Sends runs to Weights & Biases: the recipe as config, scores as summary, the files as an artifact.

    track:
      to: wandb
      project: sentiment             # by default the recipe's name
      mode: offline                  # written below the work folder; `wandb sync` sends it later

The key comes from `wandb login` or `WANDB_API_KEY`.

Source: https://docs.wandb.ai/ref/python/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optimize.track.settings import Address, Settings

if TYPE_CHECKING:
    from optimize.track.content import Content


class Config(Settings):
    """Where the run goes."""

    project: str | None = None
    """By default the recipe's name."""
    entity: str | None = None
    """The user or team; by default that of the key."""
    mode: Literal["online", "offline"] | None = None
    """By default `WANDB_MODE`, or online."""
    base_url: Address | None = None
    """A server of your own; by default `WANDB_BASE_URL`, or that of Weights & Biases."""


def send(content: Content, config: Config, base: Path) -> str:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        init_timeout=config.timeout_seconds,
        **({"base_url": config.base_url} if config.base_url else {}),
    )
    place = content.folder.absolute().parent.parent
    run = wandb.init(
        project=config.project or content.recipe_name,
        entity=config.entity,
        mode=config.mode,
        id=content.run,
        name=content.run,
        notes=content.note,
        tags=[content.tags["verdict"]],
        config=dict(content.parameters),
        dir=str(place),
        resume="allow",
        settings=settings,
    )
    # A curve's steps are the training's, not the order in which wandb hears of them.
    for name in sorted({one.name for one in content.curves}):
        run.define_metric(name, step_metric=f"{name}.step")
    for one in content.curves:
        run.log({one.name: one.value, f"{one.name}.step": one.step})
    run.summary.update({**content.metrics, **content.tags})
    report = wandb.Artifact(f"run-{content.run}", type="report")
    for path in content.files:
        report.add_file(str(path))
    run.log_artifact(report)
    where = run.url or f"{Path(run.dir).parent}, for `wandb sync`"
    run.finish(exit_code=1 if content.failed else 0)
    return str(where)
