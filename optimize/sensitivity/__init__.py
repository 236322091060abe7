"""Which layers a model's answers depend on, and the recipe that spends a budget where it hurts least.

    from optimize import sensitivity

    found = sensitivity.measure("recipe.yaml", by="block", budget="3.5", write="mixed.yaml")
    found["layers"]             # a row for each layer, with what each setting does to the answers
    found["budget"]["chosen"]   # a setting for each layer

`knobs.py` has what can differ by layer, `measuring.py` changes one layer after the other, `answers.py` sees how far the
answers move, `knapsack.py` and `spending.py` choose, `writing.py` puts the choice into the recipe's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize.errors import RecipeError

if TYPE_CHECKING:
    import os

    from optimize.progress import Progress
    from optimize.recipe import Recipe
    from optimize.work import Work


def measure(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    stage: str | None = None,
    by: Literal["layer", "block"] = "layer",
    settings: Sequence[float] | None = None,
    budget: str | float | None = None,
    write: str | os.PathLike[str] | None = None,
    check: bool = True,
    samples: int = 32,
    length: int = 128,
    seed: int = 0,
    work: Work | str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What each layer's settings do to the answers, as the document that `docs/recipes.md` describes.

    Layers are changed one at a time in the model that the stage takes, by the stage's own method, and the answers to
    `samples` rows of the calibration split (of `length` tokens at most) are held against the dense model's. `budget` is
    spent by a knapsack, `check` runs the stage with the choice and with one setting for all layers, and `write` is the
    file of a recipe to make. What is measured lies in the work folder, and is not measured again.

    Raises `RecipeError` for a recipe without such a stage and for a budget that makes no sense, and whatever building
    the stage's input raises.
    """
    from optimize.engine import build
    from optimize.planning import as_recipe, as_work
    from optimize.progress import Progress
    from optimize.sensitivity import measuring, spending, writing
    from optimize.sensitivity.knobs import KNOBS, find_stage

    recipe, work, progress = as_recipe(recipe, overrides), as_work(work), progress or Progress()
    found = find_stage(recipe, stage)
    knob = KNOBS[found.id]
    # 4.0 bits are 4: one file for both.
    given = {int(one) if float(one).is_integer() else float(one) for one in settings or ()}
    chosen = tuple(sorted(given)) or knob.settings
    knob.check(chosen)
    if recipe.model.task in _TEXT_TO_TEXT:
        raise RecipeError(f"models for {recipe.model.task} are two stacks of blocks, which this does not look at")
    if "calibration" not in recipe.data.splits:
        raise RecipeError("there are no calibration rows to measure on", hint="give `data.splits.calibration` a share")
    asked = None if budget is None else spending.Budget.read(str(budget), knob)
    if write is not None:
        if asked is None:
            raise RecipeError("a recipe is written for a budget", hint="give --budget as well")
        writing.check_target(recipe, Path(write))
    options = measuring.Options(chosen, by=by, samples=samples, length=length, seed=seed)
    artifact, data = build(recipe, found.parent, work, progress)
    room = measuring.Room(recipe, found, artifact, data, work, options, progress)
    document = measuring.measure(room)
    document = {**document, "file": str(room.file), "budget": None}
    if asked is None:
        return document
    spent = spending.spend(document, asked, room)
    config = writing.config_of(found, knob, spent.settings)
    document["budget"] = {**spent.told, "check": None, "recipe": None}
    if check:
        document["budget"]["check"] = spending.check(document, config, asked, room)
    if write is not None:
        kept = writing.write(recipe, found, config, Path(write))
        document["budget"]["recipe"] = {"path": str(write), "comments_kept": kept}
    spending.keep(document, room)
    return document


_TEXT_TO_TEXT = ("summarization", "text2text")
