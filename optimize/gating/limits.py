"""Which gates `optimize gate` judges, and over what: the recipe's own, read against what is promoted now.

With a block `against:` in the recipe, its gates stand beside the recipe's own, which stay as `apply` judges them. A
gate of the block without `over` is judged over the promoted artifact:

    against:
      gates:
        - {metric: accuracy, max_drop: 0.01}
        - {metric: latency, min_speedup: 0.95}

Without one, the recipe's own gates are read like this:

- an absolute limit (`min`, `max`, `max_ms`), a gate that names something under `over`, and a gate on a stage in the
  middle of the chain stay as they are;
- a relative limit without `over` that an unchanged model would keep (`max_drop: 0.02`) is judged over the promoted
  artifact instead of the baseline;
- a limit that asks for an improvement (`min_speedup: 1.5`, `max_ratio: 0.35`) says what the chain has to reach over a
  stage of its own, and nothing could reach it over a model that has reached it already. It stays where it is, and over
  the promoted artifact the same metric may get worse by no more than `TOLERATED` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from optimize.evaluate.types import TIMES
from optimize.recipe.limits import RELATIVE

if TYPE_CHECKING:
    from optimize.recipe import Gate, Recipe

TOLERATED = {
    **dict.fromkeys(TIMES, ("min_speedup", 0.95)),
    "size": ("max_ratio", 1.02),
    "peak_memory": ("max_ratio", 1.05),
}
"""Metric -> the limit over the promoted artifact where the recipe asks for an improvement and has no `against`."""
_TOLERATED_SHARE = {"min_ratio": 0.99, "max_ratio": 1.01}
"""The same for a task's own metrics, by the kind of limit."""


def gates_over(recipe: Recipe, rivals: Sequence[str]) -> tuple[Gate, ...]:
    """What decides: each gate over what is promoted is there once for every one of `rivals`, the promoted one first."""
    if recipe.against:
        asked = [gate for gate in recipe.against if _is_open(gate)]
        kept = [*recipe.gates, *(gate for gate in recipe.against if not _is_open(gate))]
    else:
        asked, kept = _read(recipe)
    over = [gate.model_copy(update={"over": rival}) for rival in rivals for gate in asked]
    return tuple(dict.fromkeys([*over, *kept]))


def _read(recipe: Recipe) -> tuple[list[Gate], list[Gate]]:
    """(to be judged over what is promoted, as they are) of the recipe's own gates."""
    leaves = [stage.name for stage in recipe.leaves]
    asked: list[Gate] = []
    kept: list[Gate] = []
    improving: list[Gate] = []
    for gate in recipe.gates:
        ends, middle = _split(gate, leaves)
        if gate.limit[0] in RELATIVE and ends and asks_for_improvement(gate):
            kept.append(gate)
            improving.append(ends)
        elif _is_open(gate) and ends:
            asked.append(ends)
            kept += [middle] if middle else []
        else:
            kept.append(gate)
    watched = {gate.metric for gate in asked}
    for gate in improving:
        if gate.metric not in watched:
            watched.add(gate.metric)
            asked.append(_tolerant(gate))
    return asked, kept


def asks_for_improvement(gate: Gate) -> bool:
    """Whether a model could not be shown to keep this limit over itself."""
    limit, value = gate.limit
    if limit == "max_ratio":
        return value < 1 or (value == 1 and gate.metric != "size")  # size is exact: the same is the same
    return limit in ("min_speedup", "min_ratio") and value >= 1


def _is_open(gate: Gate) -> bool:
    return gate.over is None and gate.limit[0] in RELATIVE


def _split(gate: Gate, leaves: Iterable[str]) -> tuple[Gate | None, Gate | None]:
    """The gate on the ends of the chain, which a promoted model was one of, and on what lies before."""
    if gate.on is None:
        return gate, None
    named = (gate.on,) if isinstance(gate.on, str) else gate.on
    ends = tuple(name for name in named if name in leaves)
    middle = tuple(name for name in named if name not in leaves)

    def on(names: tuple[str, ...]) -> Gate | None:
        return gate.model_copy(update={"on": names}) if names else None

    return on(ends), on(middle)


def _tolerant(gate: Gate) -> Gate:
    """The same metric on the same artifacts, which may get a little worse."""
    limit, value = TOLERATED.get(gate.metric) or (gate.limit[0], _TOLERATED_SHARE[gate.limit[0]])
    return gate.model_copy(update={gate.limit[0]: None, "over": None, limit: value})
