"""SparseGPT's numerics against the paper's own algorithm, and what they promise: the same bits on any threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from optimize.errors import StageError
from optimize.prune import unstructured_batched, unstructured_kernels
from optimize.prune.unstructured_scores import Structure, magnitude
from optimize.prune.unstructured_solver import prune_sparsegpt, prune_wanda

HALF = Structure(0.5)
TWO_OF_FOUR = Structure(0.5, 2, 4)


def problem(rows: int = 48, width: int = 96, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x *= torch.linspace(0.2, 3, width)
    return torch.randn(rows, width, generator=generator), x.T @ x / tokens


def error_of(weight: Tensor, hessian: Tensor, pruned: Tensor) -> float:
    w, h = weight.double(), hessian.double()
    loss = w - pruned.double()
    return float(((loss @ h) * loss).sum() / ((w @ h) * w).sum())


def paper(weight: Tensor, hessian: Tensor, structure: Structure, damp: float = 0.01, block: int = 128) -> np.ndarray:
    """Algorithm 1 of the paper in float64, as its authors' code has it, by the inverse Hessian's Cholesky factor."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices(len(h))] += damp * h.diagonal().mean()
    inverse = np.linalg.cholesky(np.linalg.inv(h)).T
    for start in range(0, w.shape[1], block):
        part = slice(start, min(start + block, w.shape[1]))
        diagonal = inverse.diagonal()[part]
        errors = np.zeros_like(w[:, part])
        mask = np.zeros_like(errors, dtype=bool)
        if not structure.of:
            scores = (w[:, part] / diagonal) ** 2
            mask = scores <= np.sort(scores, axis=None)[round(scores.size * structure.sparsity) - 1]
        for column in range(errors.shape[1]):
            if structure.of and column % structure.of == 0:
                group = slice(column, column + structure.of)
                scores = (w[:, part][:, group] / diagonal[group]) ** 2
                np.put_along_axis(mask[:, group], np.argsort(scores, axis=1)[:, : structure.zeros], True, axis=1)
            value = np.where(mask[:, column], 0, w[:, start + column])
            errors[:, column] = (w[:, start + column] - value) / diagonal[column]
            w[:, start + column : part.stop] -= (
                errors[:, [column]] * inverse[start + column, start + column : part.stop]
            )
            w[:, start + column] = value
        w[:, part.stop :] -= errors @ inverse[part, part.stop :]
    return w


@pytest.mark.parametrize("block", [16, 40, 128])
@pytest.mark.parametrize("structure", [HALF, Structure(0.75), TWO_OF_FOUR, Structure(0.25, 2, 8)], ids=str)
def test_without_refinement_it_is_the_papers(structure: Structure, block: int) -> None:
    weight, hessian = problem()
    (ours,) = prune_sparsegpt([weight], hessian, structure, block_size=block, refine=0)
    theirs = torch.from_numpy(paper(weight, hessian, structure, block=block))
    # Scores next to the threshold may fall either way, and a row goes its own way from there.
    assert ((ours.weight == 0) == (theirs == 0)).double().mean() > 0.995
    assert ours.error == pytest.approx(error_of(weight, hessian, theirs), rel=0.01)
    assert ours.error == pytest.approx(error_of(weight, hessian, ours.weight), rel=2e-3)


@pytest.mark.parametrize("structure", [HALF, Structure(0.8), TWO_OF_FOUR], ids=str)
def test_refinement_keeps_the_mask_and_pays(structure: Structure) -> None:
    weight, hessian = problem()
    found = [prune_sparsegpt([weight], hessian, structure, refine=steps)[0] for steps in (0, 1, 5, 20, 200)]
    assert all(torch.equal(one.weight == 0, found[0].weight == 0) for one in found)
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.95 * errors[0]
    # With enough steps each row is the least-squares solution on what stays.
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(96)
    for row in (0, 17):
        free = found[0].weight[row] != 0
        exact = torch.linalg.solve(damped[free][:, free], damped[free] @ weight[row].double())
        assert torch.allclose(found[-1].weight[row, free].double(), exact, rtol=1e-3, atol=1e-3)


def test_each_method_is_better_than_the_one_before() -> None:
    weight, hessian = problem()
    wanda = prune_wanda([weight], hessian, HALF)[0]
    sparsegpt = prune_sparsegpt([weight], hessian, HALF)[0]
    smallest = weight.masked_fill(magnitude(weight, HALF), 0)
    assert (
        wanda.magnitude_error
        == sparsegpt.magnitude_error
        == pytest.approx(error_of(weight, hessian, smallest), rel=2e-3)
    )
    assert wanda.error == pytest.approx(error_of(weight, hessian, wanda.weight), rel=2e-3)
    assert sparsegpt.error < wanda.error < wanda.magnitude_error


@pytest.mark.parametrize("sparsity", [0.01, 0.37, 0.5, 0.99])
def test_as_many_weights_go_as_asked_for(sparsity: float) -> None:
    weight, hessian = problem(rows=31, width=70)
    pruned = prune_sparsegpt([weight], hessian, Structure(sparsity), block_size=32)[0].weight
    assert int((pruned == 0).sum()) == round(sparsity * weight.numel())


@pytest.mark.parametrize("block", [4, 30, 128])
def test_two_of_four_are_exactly_that(block: int) -> None:
    weight, hessian = problem()
    pruned = prune_sparsegpt([weight], hessian, TWO_OF_FOUR, block_size=block)[0].weight
    assert bool(((pruned == 0).reshape(-1, 4).sum(dim=1) == 2).all())


@pytest.mark.parametrize("structure", [HALF, TWO_OF_FOUR], ids=str)
def test_a_mask_that_is_there_already_stays(structure: Structure) -> None:
    weight, hessian = problem()
    gone = torch.rand(48, 96, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.1, 0.9, 96)
    weight = weight.masked_fill(gone, 0)
    free, kept = prune_sparsegpt([weight, weight], hessian, structure, block_size=32, sparse=[False, True])
    assert bool((kept.weight[gone] == 0).all())
    assert int((kept.weight == 0).sum()) > int(gone.sum())
    assert bool((free.weight[gone] != 0).any())
    assert free.error < kept.error


def test_results_do_not_depend_on_threads() -> None:
    weight, hessian = problem(rows=420)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([*prune_sparsegpt([weight], hessian, HALF), *prune_wanda([weight], hessian, HALF)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one.weight, two.weight)
            assert (one.error, one.magnitude_error) == (two.error, two.magnitude_error)


def test_the_callers_tensors_stay_and_inference_mode_is_no_matter() -> None:
    weight, hessian = problem()
    copies = weight.clone(), hessian.clone()
    expected = prune_sparsegpt([weight], hessian, HALF)[0].weight
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    with torch.inference_mode():
        assert torch.equal(prune_sparsegpt([weight.clone()], hessian.clone(), HALF)[0].weight, expected)
    # A weight that lies the other way round, as GPT-2's do.
    assert torch.equal(prune_sparsegpt([weight.T.contiguous().T], hessian, HALF)[0].weight, expected)


def test_inputs_that_never_were_go_first_and_a_singular_hessian_is_damped() -> None:
    weight, hessian = problem(tokens=3)
    hessian[[3, 50]] = 0
    hessian[:, [3, 50]] = 0
    for (pruned,) in (prune_wanda([weight], hessian, HALF), prune_sparsegpt([weight], hessian, HALF)):
        assert bool((pruned.weight[:, [3, 50]] == 0).all())
        assert bool(torch.isfinite(pruned.weight).all())
    indefinite = hessian - 0.3 * hessian.diagonal().mean() * torch.eye(96)
    assert prune_sparsegpt([weight], indefinite, HALF)[0].damp_percent > 0.3
    hessian[5, 7] = torch.nan
    with pytest.raises(StageError, match="not finite"):
        prune_sparsegpt([weight], hessian, HALF)


def compiled(*arguments: Tensor | int) -> None:
    unstructured_kernels.sweep(*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))


@pytest.mark.parametrize("structure", [HALF, TWO_OF_FOUR], ids=str)
def test_the_batched_loop_does_what_the_compiled_one_does(structure: Structure) -> None:
    weight, _ = problem(rows=20)
    feedback = torch.triu(torch.full((96, 96), 0.01), 1)
    results = []
    for sweep in (compiled, unstructured_batched.sweep):
        given: Callable[..., None] = sweep
        pruned = torch.zeros(20, 96, dtype=torch.bool) if structure.of else weight.abs() < 0.5
        pruned[:, 1] = True
        values, loss = torch.empty(20, 96), torch.empty(20, 96)
        given(
            weight,
            weight + 0.1,
            feedback,
            torch.linspace(1, 2, 96),
            structure.zeros,
            structure.of,
            pruned,
            values,
            loss,
        )
        assert torch.equal(values == 0, pruned)
        assert torch.allclose(loss, weight - values)
        results.append((pruned, values))
    (pruned, values), (others, theirs) = results
    assert (pruned == others).float().mean() > 0.99
    assert torch.allclose(values[pruned == others], theirs[pruned == others], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("structure", [HALF, TWO_OF_FOUR], ids=str)
def test_a_gpu_finds_the_same(structure: Structure) -> None:
    weight, hessian = problem()
    (here,), (there,) = (
        prune_sparsegpt([w], h, structure) for w, h in ((weight, hessian), (weight.cuda(), hessian.cuda()))
    )
    assert there.weight.is_cuda
    assert there.error == pytest.approx(here.error, rel=0.02)
    assert there.magnitude_error == pytest.approx(here.magnitude_error, rel=0.01)
