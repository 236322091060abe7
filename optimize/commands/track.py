"""`optimize track`: a run that is on the disk, sent to a tracker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError

if TYPE_CHECKING:
    from optimize.track import Target


def send(run: str, names: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """Send it, and say where it is now, as JSON. Raises `RecipeError` where it is not known where to, and
    `TrackingError` where it can't be sent."""
    from optimize.run import find_run
    from optimize.track import sending
    from optimize.work import Work

    folder, document = find_run(Work(), run)
    if names:
        targets, base = _asked(names, settings), Path.cwd()
    else:
        targets, base = _of_recipe(folder, settings), None
    sent = [{"to": target.to, "where": sending.send(folder, target, base)} for target in targets]
    return {"run": document["run"], "sent": sent}


def _asked(names: Sequence[str], settings: Sequence[str]) -> tuple[Target, ...]:
    from optimize.recipe.overrides import override
    from optimize.recipe.text import from_mapping

    if settings and len(names) > 1:
        raise RecipeError("`--set` is of one tracker, and there are several", hint="send to one after the other")
    text = from_mapping({"track": [{"to": name} for name in names]}, "--to")
    override(text, [f"track.0.{setting}" for setting in settings], env=False)
    return _read(text)


def _of_recipe(folder: Path, settings: Sequence[str]) -> tuple[Target, ...]:
    from optimize.recipe.text import from_mapping

    try:
        found = json.loads((folder / "recipe.json").read_bytes())["recipe"].get("track")
    except (OSError, ValueError, KeyError, AttributeError):
        found = None
    if not found or settings:
        message = "`--set` is a setting of `--to`" if settings else "the run's recipe names no tracker"
        raise RecipeError(message, hint="name one: --to mlflow, --to tensorboard or --to wandb")
    return _read(from_mapping({"track": found}, str(folder / "recipe.json")))


def _read(text: Any) -> tuple[Target, ...]:
    from optimize.recipe.track import read_track

    targets = read_track(text, text.value.get("track"))
    text.raise_mistakes()
    return targets
