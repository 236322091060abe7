"""Which units go: never too many, never all of a layer, always the least ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from optimize.errors import StageError
from optimize.prune.selection import choose, kept

RATIOS = some.floats(0.01, 0.99)


@given(units=some.integers(1, 4096), ratio=RATIOS, round_to=some.sampled_from([1, 4, 8, 32]))
def test_what_stays_is_the_nearest_multiple(units: int, ratio: float, round_to: int) -> None:
    left = kept(units, ratio, round_to)
    assert left == units or left % round_to == 0
    assert left == units or abs(left - units * (1 - ratio)) <= round_to / 2 + 1e-6


@given(
    sizes=some.lists(some.integers(1, 40), min_size=1, max_size=5),
    ratio=RATIOS,
    shared=some.booleans(),
    round_to=some.sampled_from([1, 4]),
    seed=some.integers(0, 100),
)
def test_the_least_go_and_some_stay(sizes: list[int], ratio: float, shared: bool, round_to: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"layer{i}": torch.rand(size, generator=generator) for i, size in enumerate(sizes)}
    initial = {f"layer{i}": size for i, size in enumerate(sizes)}
    try:
        gone = choose(scores, initial, ratio, global_pruning=shared, round_to=round_to, max_pruning_ratio=0.9)
    except StageError:
        return
    for name, values in scores.items():
        dropped = torch.zeros(len(values), dtype=torch.bool)
        dropped[gone[name]] = True
        assert not dropped.all()
        if dropped.any():
            assert values[dropped].max() <= values[~dropped].min()
        stay = int((~dropped).sum())
        assert stay == len(values) or stay % round_to == 0
    if not shared:
        assert all(
            len(values) - len(gone[name]) == kept(len(values), ratio, round_to) for name, values in scores.items()
        )


def test_global_ranking_takes_from_whom_it_matters_least() -> None:
    scores = {"weak": torch.arange(10.0), "strong": torch.arange(100.0, 110.0)}
    gone = choose(scores, {"weak": 10, "strong": 10}, 0.5, global_pruning=True, max_pruning_ratio=0.8)
    assert (len(gone["weak"]), len(gone["strong"])) == (8, 2)


def test_later_steps_count_from_the_beginning() -> None:
    gone = choose({"layer": torch.arange(8.0)}, {"layer": 10}, 0.5)
    assert gone["layer"] == [0, 1, 2]


@pytest.mark.parametrize(("units", "ratio", "round_to"), [(2, 0.8, 1), (64, 0.9, 32), (1, 0.6, 1)])
def test_an_empty_layer_is_refused(units: int, ratio: float, round_to: int) -> None:
    with pytest.raises(StageError, match="leaves nothing of the"):
        choose({"layer": torch.rand(units)}, {"layer": units}, ratio, round_to=round_to)


def test_a_global_ratio_beyond_all_floors_is_refused() -> None:
    scores = {"a": torch.rand(10), "b": torch.rand(10)}
    with pytest.raises(StageError, match="more than all layers together"):
        choose(scores, {"a": 10, "b": 10}, 0.6, global_pruning=True, max_pruning_ratio=0.5)
