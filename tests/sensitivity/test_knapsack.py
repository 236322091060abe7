"""The knapsack: as good as trying everything, and honest where it is not exact."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.sensitivity import knapsack

DAMAGE = st.integers(0, 50).map(float)
GROUP = st.lists(st.tuples(DAMAGE, st.integers(0, 12)), min_size=1, max_size=4)


def best(groups: list[list[tuple[float, int]]], budget: int) -> float | None:
    """By trying everything."""
    sums = [
        sum(damage for damage, _ in choice)
        for choice in itertools.product(*groups)
        if sum(cost for _, cost in choice) <= budget
    ]
    return min(sums, default=None)


@settings(max_examples=150, deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=5), st.integers(0, 50), st.integers(1, 1000))
def test_the_choice_is_the_best_there_is(groups: list[list[tuple[float, int]]], budget: int, scale: int) -> None:
    damages = [[damage for damage, _ in group] for group in groups]
    costs = [[cost * scale for _, cost in group] for group in groups]
    found = knapsack.solve(damages, costs, budget * scale)
    expected = best(groups, budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.gap == 0
    assert found.damage == expected == sum(damages[i][item] for i, item in enumerate(found.items))
    assert found.cost == sum(costs[i][item] for i, item in enumerate(found.items)) <= budget * scale
    assert knapsack.bound(damages, costs, budget * scale) <= expected + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(GROUP, min_size=2, max_size=5), st.integers(0, 50))
def test_a_coarse_search_fits_and_knows_how_far_it_may_be_off(
    groups: list[list[tuple[float, int]]], budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "SUMS", 5)
        damages = [[damage for damage, _ in group] for group in groups]
        costs = [[cost for _, cost in group] for group in groups]
        found, expected = knapsack.solve(damages, costs, budget), best(groups, budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.cost <= budget
    assert expected - 1e-9 <= found.damage <= expected + found.gap + 1e-9
