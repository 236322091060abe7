"""A budget, spent where it hurts least: each layer's setting by a knapsack, and what the mix then really does.

The choice supposes that damages of layers add up, which they do only roughly. So the stage is run with the chosen
settings, and with one setting for all layers at the same budget; both answer the same calibration rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optimize import atomic
from optimize.blockwise.abreast import threads
from optimize.blockwise.sequence import rounded
from optimize.errors import RecipeError
from optimize.quiet import quiet
from optimize.sensitivity import knapsack
from optimize.sensitivity.knobs import Knob, Setting
from optimize.sensitivity.measuring import Room, described, interval
from optimize.sensitivity.writing import config_of

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.config import Block
    from optimize.sensitivity.answers import Moved

_WORST = 1e9
"""Of answers that are no numbers, in nats."""


@dataclass(frozen=True)
class Budget:
    """What may be spent: `4` (mean bits of a weight), `0.5` (the share of zeros), or `30%` of the size of the files
    that the stage takes."""

    value: float
    of_size: bool = False

    @staticmethod
    def read(text: str, knob: Knob) -> Budget:
        """Raises `RecipeError` where that is no budget of such a knob."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
        hint = "a mean such as 4, or a share of the size such as 30%" if knob.name == "bits" else "a share such as 0.5"
        if not found or not float(found[1]):
            raise RecipeError(f"{text[:40]!r} is no budget of {knob.name}", hint=hint)
        value, of_size = float(found[1]), bool(found[2])
        if of_size and knob.name != "bits":
            raise RecipeError("zeros make no file smaller, so that a share of the size is no budget", hint=hint)
        if knob.name == "sparsity" and value >= 1:
            raise RecipeError(f"a sparsity of {value:g} leaves nothing", hint=hint)
        return Budget(value / 100 if of_size else value, of_size)


@dataclass(frozen=True)
class Spent:
    """The setting of every layer, and what is known of it."""

    settings: Mapping[str, Setting]
    """By the layer's name."""
    told: dict[str, Any]
    """JSON."""


def spend(document: Mapping[str, Any], budget: Budget, room: Room) -> Spent:
    """Choose. Raises `RecipeError` where even the cheapest settings cost more than the budget."""
    knob, rows = room.knob, document["layers"]
    total = sum(row["weights"] for row in rows)
    damages = [[_damage(one) for one in row["settings"]] for row in rows]
    costs, most = _costs(document, budget, room)
    choice = knapsack.solve(damages, costs, most)
    if choice is None:
        cheapest = min if knob.name == "bits" else max
        least = cheapest(document["settings"])
        raise RecipeError(
            f"the budget can't be met: {least:g} in every layer costs more", hint="raise --budget, or give --settings"
        )
    chosen = {row["name"]: row["settings"][item]["setting"] for row, item in zip(rows, choice.items, strict=True)}
    cost = sum(knob.cost(chosen[row["name"]], row["weights"]) for row in rows)
    told = {
        "asked": {"value": budget.value, "of": "size" if budget.of_size else knob.name},
        knob.name: rounded(knob.spent(cost, total)),
        "chosen": chosen,
        "predicted": rounded(choice.damage),
        "gap": rounded(choice.gap),
    }
    if budget.of_size:
        told["size_bytes"] = choice.cost
    settings = {name: chosen[row["name"]] for row in rows for name in row["modules"]}
    return Spent(settings, told)


def uniform(document: Mapping[str, Any], budget: Budget, room: Room) -> Setting | None:
    """The one setting for all layers that the budget allows; None where there is none."""
    if not budget.of_size:
        return room.knob.uniform(budget.value, tuple(document["settings"]))
    costs, most = _costs(document, budget, room)
    fitting = [one for i, one in enumerate(document["settings"]) if sum(cost[i] for cost in costs) <= most]
    return max(fitting, default=None)


def check(document: Mapping[str, Any], config: Block, budget: Budget, room: Room) -> dict[str, Any]:
    """What the stage's artifacts answer: by the config with the chosen settings, and with one for all. JSON.

    The artifacts go to the store, where `apply` finds them.
    """
    common = uniform(document, budget, room)
    made = {"mix": _run_stage(room, config)}
    if common is not None:
        alike = replace(room.stage, config=room.knob.all_alike(room.stage.config, common))
        names = [name for row in document["layers"] for name in row["modules"]]
        made["uniform"] = _run_stage(room, config_of(alike, room.knob, dict.fromkeys(names, common)))
    found: dict[str, Moved] = {}
    with quiet(), threads(getattr(room.config, "threads", None)):
        from optimize.quantize import checkpoint

        bench = room.open()
        empty = checkpoint.empty_model(room.artifact, checkpoint.float_config(room.artifact))
        for name, artifact in made.items():
            weights = {layer: room.knob.weight(artifact, layer, empty).float() for layer in bench.layers}
            found[name] = bench.moved(weights)
        told: dict[str, Any] = {
            name: {**described(moved, bench.judge.loss), "size_bytes": made[name].size_bytes}
            for name, moved in found.items()
        }
    if common is None:
        return {**told, "uniform": None, "difference": None, "better": None}
    told["uniform"] = {"setting": common, **told["uniform"]}
    difference = found["mix"].distances - found["uniform"].distances
    ci = interval(difference) if np.isfinite(difference).all() else None
    better = None if ci is None else "mix" if ci[1] < 0 else "uniform" if ci[0] > 0 else "undecided"
    mean = float(difference.mean())
    return {
        **told,
        "difference": {"distance": rounded(mean) if math.isfinite(mean) else None, "ci": ci},
        "better": better,
    }


def keep(document: Mapping[str, Any], room: Room) -> None:
    """Have what was chosen in the file, too."""
    atomic.write_json(room.file, {name: value for name, value in document.items() if name != "file"})


def _run_stage(room: Room, config: Block) -> Artifact:
    from optimize.engine import build

    stages = [replace(one, config=config) if one.name == room.stage.name else one for one in room.recipe.stages]
    return build(replace(room.recipe, stages=tuple(stages)), room.stage.name, room.work, room.progress)[0]


def _damage(found: Mapping[str, Any]) -> float:
    return _WORST if found["distance"] is None else max(0.0, float(found["distance"]))


def _costs(document: Mapping[str, Any], budget: Budget, room: Room) -> tuple[Sequence[Sequence[int]], int]:
    """Of each row at every setting, and the most that their sum may be."""
    rows, knob = document["layers"], room.knob
    if not budget.of_size:
        total = sum(row["weights"] for row in rows)
        return [[knob.cost(one["setting"], row["weights"]) for one in row["settings"]] for row in rows], knob.budget(
            budget.value, total
        )
    sizes = _packed_bytes(document, room)
    rest = room.artifact.size_bytes - sum(sizes[name][None] for row in rows for name in row["modules"])
    most = int(budget.value * room.artifact.size_bytes) - rest
    return [
        [sum(sizes[name][one["setting"]] for name in row["modules"]) for one in row["settings"]] for row in rows
    ], most


def _packed_bytes(document: Mapping[str, Any], room: Room) -> dict[str, dict[Setting | None, int]]:
    """Of each layer, in the checkpoint at every width; under None as it is now."""
    from optimize.blockwise.lazy_weights import checkpoint_tensors
    from optimize.blockwise.sequence import oriented
    from optimize.quantize import checkpoint
    from optimize.quantize.gptq import grids_of
    from optimize.quantize.gptq_format import packed_bytes

    empty = checkpoint.empty_model(room.artifact, checkpoint.float_config(room.artifact))
    stored = checkpoint_tensors(room.artifact.path, empty)
    names = [name for row in document["layers"] for name in row["modules"]]
    shapes = {name: oriented(empty.get_submodule(name)).shape for name in names}
    sizes: dict[str, dict[Setting | None, int]] = {name: {None: stored[f"{name}.weight"].size_bytes} for name in names}
    for setting in document["settings"]:
        grids = grids_of(names, room.knob.told(room.config, dict.fromkeys(names, setting)))
        for name in names:
            sizes[name][setting] = packed_bytes(shapes[name], grids[name])
    return sizes
