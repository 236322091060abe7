"""Which weights go: against the papers' own words in NumPy, with ties, and with every pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimize.prune.unstructured_scores import Structure, below, cut, least, magnitude, wanda


def weights(rows: int = 24, width: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.625])
def test_wanda_is_the_papers(sparsity: float) -> None:
    weight, x = weights(), weights(200, 40, seed=1) * torch.linspace(0.1, 5, 40)
    mask = wanda(weight, x.T @ x / len(x), Structure(sparsity))
    # Its Algorithm 1, line by line: metric = W.abs() * X.norm(p=2, dim=0), and the lowest of each output go.
    metric = np.abs(weight.double().numpy()) * np.linalg.norm(x.double().numpy(), axis=0)
    lowest = np.argsort(metric, axis=1, kind="stable")[:, : int(40 * sparsity)]
    expected = np.zeros_like(metric, dtype=bool)
    np.put_along_axis(expected, lowest, True, axis=1)
    assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize(("zeros", "of"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_patterns_have_exactly_their_zeros(zeros: int, of: int) -> None:
    weight, x = weights(), weights(200, 40, seed=1)
    structure = Structure(zeros / of, zeros, of)
    for mask, scores in (
        (magnitude(weight, structure), weight.abs()),
        (wanda(weight, x.T @ x, structure), weight.abs() * x.norm(dim=0)),
    ):
        groups = mask.reshape(-1, of)
        assert bool((groups.sum(dim=1) == zeros).all())
        worst_gone = scores.reshape(-1, of).masked_fill(~groups, -1).amax(dim=1)
        best_kept = scores.reshape(-1, of).masked_fill(groups, torch.inf).amin(dim=1)
        assert bool((worst_gone <= best_kept * (1 + 1e-6)).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=150), st.data())
def test_the_least_are_as_many_as_asked_for_and_of_equal_ones_the_first(
    values: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(values)))
    mask = least(torch.tensor([values, values]), count)
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(values, kind="stable")[:count]] = True
    assert mask.tolist() == [expected.tolist()] * 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sparsity=st.floats(0.01, 0.99), half=st.booleans(), seed=st.integers(0, 100))
def test_a_cut_through_all_layers_is_where_sorting_them_all_would_put_it(
    sparsity: float, half: bool, seed: int
) -> None:
    layers = [weights(7, 11, seed), weights(20, 30, seed + 1) * 3, torch.zeros(2, 3)]
    if half:  # few different values, and so many ties
        layers = [layer.to(torch.bfloat16) for layer in layers]
    value, share = cut(lambda: layers, sparsity)
    everything = torch.cat([layer.float().abs().reshape(-1) for layer in layers]).sort().values
    wanted = round(sparsity * len(everything))
    assert value == float(everything[max(wanted, 1) - 1])
    assert 0 <= share <= 1
    gone = sum(int(below(layer, value, share).sum()) for layer in layers)
    assert abs(gone - wanted) <= len(layers)


def test_a_cut_takes_most_from_the_layer_with_the_smallest_weights() -> None:
    small, large = weights(), weights(seed=1) * 10
    level = cut(lambda: [small, large], 0.5)
    masks = [below(layer, *level) for layer in (small, large)]
    assert masks[0].float().mean() > 0.8
    assert masks[1].float().mean() < 0.2
    assert int(masks[0].sum() + masks[1].sum()) == small.numel()
