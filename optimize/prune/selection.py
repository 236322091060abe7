"""Which units go: arithmetic on importances, the same for heads and for channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from optimize.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor


def kept(units: int, ratio: float, round_to: int) -> int:
    """How many of `units` stay at a pruning ratio: the nearest multiple of `round_to`, and no more than there are."""
    return min(units, _nearest(units * (1 - ratio), round_to))


def _nearest(number: float, multiple: int) -> int:
    return math.floor(number / multiple + 0.5) * multiple


def choose(
    scores: Mapping[str, Tensor],
    initial: Mapping[str, int],
    ratio: float,
    *,
    global_pruning: bool = False,
    round_to: int = 1,
    max_pruning_ratio: float = 1.0,
) -> dict[str, list[int]]:
    """Name of a dimension -> its units that go, the least important ones, in order.

    `scores` has those that are left, of `initial` units that a dimension had at first; `ratio` is the share of those
    that shall be gone afterwards. Where `global_pruning`, dimensions share one ranking, and each loses at most
    `max_pruning_ratio` of its units. Raises `StageError` where nothing would be left of a dimension.
    """
    for name, units in initial.items():
        if kept(units, ratio, round_to) < 1:
            multiple = f" in multiples of {round_to}" if round_to > 1 else ""
            raise StageError(
                f"pruning_ratio {ratio:.4g} leaves nothing of the {units} units{multiple} that {name} reads",
                hint="lower pruning_ratio or round_to, or name the layer in `ignore`",
            )
    wanted = {name: kept(units, ratio, round_to) for name, units in initial.items()}
    if global_pruning:
        wanted = _shared(scores, initial, ratio, round_to, max_pruning_ratio)
    gone = {}
    for name, values in scores.items():
        count = max(0, len(values) - wanted[name])
        gone[name] = sorted(values.argsort(stable=True)[:count].tolist())
    return gone


def _shared(
    scores: Mapping[str, Tensor], initial: Mapping[str, int], ratio: float, round_to: int, most: float
) -> dict[str, int]:
    """How many units each dimension keeps when the least important of all go, as far as each one's floor allows."""
    floors = {name: max(kept(units, most, round_to), min(round_to, units)) for name, units in initial.items()}
    left = {name: len(values) for name, values in scores.items()}
    surplus = sum(left.values()) - math.floor(sum(initial.values()) * (1 - ratio) + 0.5)
    ranked = sorted((value, name) for name, values in scores.items() for value in values.tolist())
    for _, name in ranked:
        if surplus > 0 and left[name] > floors[name]:
            left[name] -= 1
            surplus -= 1
    if surplus > 0:
        raise StageError(
            f"pruning_ratio {ratio:.4g} is more than all layers together can lose",
            hint=f"lower it, or raise max_pruning_ratio ({most:g}), which no layer may lose more than",
        )
    return {name: max(floors[name], min(len(scores[name]), _nearest(left[name], round_to))) for name in left}
