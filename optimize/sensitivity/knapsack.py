"""The multiple-choice knapsack: one setting of each layer, so that the damages' sum is least and the costs fit.

Exact by dynamic programming where the costs share a divisor that leaves few enough sums, as whole numbers of weights
times bits nearly always do. Else costs are rounded up to a grain, so that what is found fits the budget, and `gap` says
how far from the best it may be at most: Lagrange's dual of the problem bounds that from below (Sinha and Zoltners,
Operations Research 27, 503-515, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUMS = 1 << 16
"""Sums of costs that are told apart."""


@dataclass(frozen=True)
class Choice:
    """One item of each group."""

    items: tuple[int, ...]
    """Indices, one a group."""
    damage: float
    cost: int
    gap: float
    """The damage is at most so far above the least that fits; 0 where it is the least."""


def solve(damages: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> Choice | None:
    """Of each group the item that makes the sum of `damages` least with `costs` (whole, not negative) of `budget` at
    most; None where the cheapest items cost more.
    """
    lowest = [min(group) for group in costs]
    room = budget - sum(lowest)
    if room < 0:
        return None
    extra = [[cost - least for cost in group] for group, least in zip(costs, lowest, strict=True)]
    # No more room than all of the dearest items take.
    room = min(room, sum(max(group) for group in extra))
    step = math.gcd(*(cost for group in extra for cost in group)) or 1
    grain = step if room // step <= SUMS else -(-room // SUMS)
    rounded = [[-(-cost // grain) for cost in group] for group in extra]
    items = _search(damages, rounded, room // grain)
    damage = sum(group[item] for group, item in zip(damages, items, strict=True))
    cost = sum(group[item] for group, item in zip(costs, items, strict=True))
    exact = all(cost % grain == 0 for group in extra for cost in group)
    return Choice(items, damage, cost, 0.0 if exact else max(0.0, damage - bound(damages, costs, budget)))


def bound(damages: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> float:
    """Of any choice that fits the budget, a lower bound of the damage: the best of Lagrange's dual.

    The dual, the least of damage + price * (cost - budget), is concave in the price; between the prices at which items
    change places it is a straight line, so that one of these, or 0, is the best.
    """
    prices = {0.0}
    for damage, cost in zip(damages, costs, strict=True):
        for i, one in enumerate(cost):
            for j in range(i):
                if one != cost[j] and (price := (damage[j] - damage[i]) / (one - cost[j])) > 0:
                    prices.add(price)

    def dual(price: float) -> float:
        pairs = zip(damages, costs, strict=True)
        return sum(min(d + price * c for d, c in zip(*pair, strict=True)) for pair in pairs) - price * budget

    ordered = sorted(prices)
    low, high = 0, len(ordered) - 1
    while low < high:
        middle = (low + high) // 2
        if dual(ordered[middle]) < dual(ordered[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return dual(ordered[low])


def _search(damages: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], room: int) -> tuple[int, ...]:
    """Dynamic programming over what is left: `least[r]` is the least damage of the groups so far with r to spend."""
    least: NDArray[np.float64] = np.zeros(room + 1)
    taken: list[Any] = []
    for damage, cost in zip(damages, costs, strict=True):
        best = np.full(room + 1, np.inf)
        chosen = np.zeros(room + 1, dtype=np.int8)
        for item in sorted(range(len(damage)), key=lambda i: cost[i]):
            if cost[item] > room:
                break
            tried = least[: room + 1 - cost[item]] + damage[item]
            better = tried < best[cost[item] :]
            best[cost[item] :][better] = tried[better]
            chosen[cost[item] :][better] = item
        least = best
        taken.append(chosen)
    left, items = room, []
    for chosen, cost in zip(reversed(taken), reversed(costs), strict=True):
        items.append(int(chosen[left]))
        left -= cost[items[-1]]
    return tuple(reversed(items))
