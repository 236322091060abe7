"""GPTQ's numerics against a textbook, and what they promise: no worse than rounding to nearest, the same every time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimize.blockwise.hessian import Hessian
from optimize.errors import StageError
from optimize.quantize import gptq_batched, gptq_kernels
from optimize.quantize.gptq_solver import Grid, Quantized, round_to_nearest, solve, solve_all

GRIDS = [Grid(bits, size, sym) for bits, size, sym in product((2, 3, 4, 8), (32, -1, 40), (True, False))]


def problem(rows: int = 48, width: int = 96, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    hessian = Hessian(width)
    hessian.add(x)
    return torch.randn(rows, width, generator=generator), hessian.matrix


def error_of(weight: Tensor, hessian: Tensor, quantized: Quantized) -> float:
    w, h = weight.double(), hessian.double()
    loss = w - quantized.dequantize().double()
    return float(((loss @ h) * loss).sum() / ((w @ h) * w).sum())


def textbook(weight: Tensor, hessian: Tensor, quantized: Quantized, grid: Grid, damp: float, act: bool) -> np.ndarray:
    """Codes of the paper's Algorithm 1, one column after the other by the inverse Hessian, on the grids given."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices(len(h))] += damp * h.diagonal().mean()
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if act else np.arange(len(h))
    inverse = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    scales, zeros = quantized.scales.double().numpy(), quantized.zeros.double().numpy()
    codes = np.empty_like(w)
    for step, column in enumerate(order):
        group = quantized.group_of[column]
        scale, zero = scales[:, group], zeros[:, group]
        codes[:, column] = np.clip(np.rint(w[:, column] / scale) + zero, 0, grid.top)
        loss = (w[:, column] - scale * (codes[:, column] - zero)) / inverse[step, step]
        w[:, order[step:]] -= loss[:, None] * inverse[step, step:]
    return codes


@pytest.mark.parametrize("block_size", [16, 40, 128])
@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(3, 40, False), Grid(2, -1, True)])
def test_without_extras_it_is_the_textbook(grid: Grid, act: bool, block_size: int) -> None:
    weight, hessian = problem()
    solution = solve(
        weight, hessian, grid, desc_act=act, block_size=block_size, scale_search=False, refine=0, damp_percent=0.02
    )
    expected = textbook(weight, hessian, solution.quantized, grid, 0.02, act)
    assert solution.rtn_rows == 0
    # A value half-way between two codes may fall either way, and a row goes its own way from there.
    assert (solution.quantized.codes.numpy() == expected).mean() > 0.99


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_grids_and_the_reported_error_are_right(grid: Grid, static: bool) -> None:
    weight, hessian = problem()
    solution = solve(weight, hessian, grid, static_groups=static)
    quantized = solution.quantized
    assert quantized.codes.dtype == quantized.zeros.dtype == torch.uint8
    assert int(quantized.codes.max()) <= grid.top
    assert int(quantized.zeros.min()) >= 1
    assert int(quantized.zeros.max()) <= grid.top
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert quantized.group_of.dtype == torch.int32
    assert quantized.group_of.bincount().tolist() == (
        [96] if grid.group_size == -1 else [32] * 3 if grid.group_size == 32 else [40, 40, 16]
    )
    in_order = torch.arange(96) // grid.size(96)
    assert torch.equal(quantized.group_of.long(), in_order) == (static or grid.group_size == -1)
    if grid.sym:
        assert bool((quantized.zeros == 2 ** (grid.bits - 1)).all())
    assert solution.error == pytest.approx(error_of(weight, hessian, quantized), rel=2e-3)
    assert solution.error < 0.7 * solution.rtn_error


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    tokens=st.integers(1, 60),
    grid=st.sampled_from(GRIDS),
    search=st.booleans(),
    refine=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_it_is_never_worse_than_rounding_to_nearest(
    rows: int, width: int, tokens: int, grid: Grid, search: bool, refine: int, seed: int
) -> None:
    weight, hessian = problem(rows, width, tokens, seed)
    solution = solve(weight, hessian, grid, scale_search=search, refine=refine, block_size=32)
    assert 0 <= solution.rtn_rows <= rows
    assert solution.error <= solution.rtn_error
    assert bool(torch.isfinite(solution.quantized.dequantize()).all())


@pytest.mark.parametrize("grid", [Grid(3, 32, True), Grid(4, 32, True), Grid(3, 32, False)], ids=str)
def test_each_extra_pays(grid: Grid) -> None:
    weight, hessian = problem()
    plain = solve(weight, hessian, grid, scale_search=False, refine=0).error
    searched = solve(weight, hessian, grid, refine=0).error
    refined = [solve(weight, hessian, grid, refine=rounds).error for rounds in (1, 2)]
    assert plain > searched > refined[0] > refined[1]


def test_results_depend_neither_on_threads_nor_on_neighbouring_rows() -> None:
    weight, hessian = problem(rows=420)
    before = torch.get_num_threads()
    try:
        solutions = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            solutions.append(solve(weight, hessian, Grid(3, 32, True)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    first = solutions[0].quantized
    for other in solutions[1:]:
        assert torch.equal(first.codes, other.quantized.codes)
        assert torch.equal(first.scales, other.quantized.scales)
        assert other.error == solutions[0].error
    alone = solve(weight[:192], hessian, Grid(3, 32, True)).quantized
    assert torch.equal(first.codes[:192], alone.codes)


def test_the_callers_tensors_stay_as_they_are_and_any_float_type_will_do() -> None:
    weight, hessian = problem()
    copies = weight.clone(), hessian.clone()
    solve(weight, hessian, Grid(4, 32, True))
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    half = weight.to(torch.bfloat16)
    given_half, given_float = (solve(w, hessian, Grid(4, 32, True)).quantized for w in (half, half.float()))
    assert torch.equal(given_half.codes, given_float.codes)


def test_inputs_that_never_were_are_counted_and_rounded_to_nearest() -> None:
    weight, hessian = problem()
    hessian[[3, 50]] = 0
    hessian[:, [3, 50]] = 0
    solution = solve(weight, hessian, Grid(4, 32, True))
    assert solution.dead == 2
    q = solution.quantized
    scales, zeros = q.scales[:, q.group_of[[3, 50]].long()], q.zeros[:, q.group_of[[3, 50]].long()]
    nearest = ((weight[:, [3, 50]] / scales).round() + zeros).clamp(0, 15)
    assert torch.equal(q.codes[:, [3, 50]].float(), nearest)
    none = solve(weight, torch.zeros_like(hessian), Grid(8, 32, True))
    assert (none.dead, none.error, none.rtn_error) == (96, 0.0, 0.0)
    assert torch.allclose(none.quantized.dequantize(), weight, atol=0.05)


def test_a_singular_hessian_is_damped_as_far_as_it_takes() -> None:
    weight, hessian = problem(tokens=3)
    solution = solve(weight, hessian, Grid(4, 32, True))
    assert solution.damp_percent == 0.01
    assert solution.error < 0.2 * solution.rtn_error
    indefinite = hessian - 0.3 * hessian.diagonal().mean() * torch.eye(96)
    assert solve(weight, indefinite, Grid(4, 32, True)).damp_percent == pytest.approx(0.64)
    with pytest.raises(StageError, match="can't be factorised"):
        solve(weight, hessian - 5 * hessian.diagonal().mean() * torch.eye(96), Grid(4, 32, True))
    hessian[5, 7] = torch.nan
    with pytest.raises(StageError, match="not finite"):
        solve(weight, hessian, Grid(4, 32, True))


def test_rounding_to_nearest_is_off_by_half_a_step_and_constant_groups_survive() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest(weight, Grid(4, 32, False))
    steps = quantized.scales[:, quantized.group_of.long()]
    assert bool(((weight - quantized.dequantize()).abs() <= 0.51 * steps).all())
    for value in (0.0, 1e-9, 0.7, -0.7, 1e9):
        for sym in (True, False):
            flat = round_to_nearest(torch.full((2, 64), value), Grid(4, 32, sym))
            assert bool(torch.isfinite(flat.dequantize()).all())
            assert int(flat.zeros.min()) >= 1


def _kernels(device: str) -> dict[str, Callable[..., None]]:
    def compiled(name: str) -> Callable[..., None]:
        def call(*arguments: Tensor | float) -> None:
            getattr(gptq_kernels, name)(*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))

        return call

    names = ("choose", "sweep", "descend")
    return {name: compiled(name) if device == "compiled" else getattr(gptq_batched, name) for name in names}


def test_batched_loops_do_what_compiled_ones_do() -> None:
    weight, hessian = problem(rows=20)
    group_of = torch.arange(96) // 40
    scales = (torch.rand(20, 3, 5) + 0.2) * torch.tensor([1, -1, 1, -1, 1])
    zeros = torch.full_like(scales, 4)
    free = torch.rand(20, 96) > 0.2
    weight *= free
    results = []
    for device in ("compiled", "batched"):
        kernels = _kernels(device)
        best = torch.zeros(20, 3, dtype=torch.int64)
        kernels["choose"](weight, hessian.diagonal().contiguous(), 40, scales, zeros, 7, best)
        s, z = (values.gather(2, best[..., None])[..., 0] for values in (scales, zeros))
        codes, loss = torch.empty(20, 96), torch.empty(20, 96)
        feedback = torch.triu(torch.full((96, 96), 0.01), 1)
        kernels["sweep"](weight, weight.clone(), free, feedback, s[:, group_of], z[:, group_of], 7, codes, loss)
        swept = codes.clone()
        gradient = loss @ hessian
        kernels["descend"](codes, loss, gradient, hessian, free, torch.arange(95, -1, -1), group_of, s, z, 7)
        results.append((best, swept, codes, loss, gradient))
        assert bool((codes == z[:, group_of])[~free].all())
    (best, swept, codes, loss, gradient), others = results
    assert torch.equal(best, others[0])
    for ours, theirs in ((swept, others[1]), (codes, others[2])):
        assert (ours == theirs).float().mean() > 0.99
    assert torch.allclose(gradient, loss @ hessian, rtol=1e-2, atol=1e-2)
    assert torch.allclose(others[4], others[3] @ hessian, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grid", GRIDS[:6], ids=str)
def test_a_gpu_finds_the_same(grid: Grid) -> None:
    weight, hessian = problem()
    here, there = solve(weight, hessian, grid), solve(weight.cuda(), hessian.cuda(), grid)
    assert there.quantized.codes.is_cuda
    assert there.error == pytest.approx(here.error, rel=0.05)
    assert there.rtn_error == pytest.approx(here.rtn_error, rel=0.01)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(3, 40, False), Grid(2, -1, True)], ids=str)
def test_zeros_of_a_sparse_weight_stay_and_those_of_a_dense_one_may_move(grid: Grid, static: bool) -> None:
    weight, hessian = problem()
    weight *= torch.rand(48, 96, generator=torch.Generator().manual_seed(2)) < 0.5
    sparse, dense = solve_all([weight, weight], hessian, grid, static_groups=static, sparse=[True, False])
    pruned = weight == 0
    assert bool((sparse.quantized.dequantize()[pruned] == 0).all())
    assert bool((dense.quantized.dequantize()[pruned] != 0).any())
    assert dense.error < sparse.error < 0.8 * sparse.rtn_error
    assert sparse.error == pytest.approx(error_of(weight, hessian, sparse.quantized), rel=2e-3)


def test_it_solves_under_inference_mode() -> None:
    weight, hessian = problem()
    expected = solve(weight, hessian, Grid(4, 32, True)).quantized
    with torch.inference_mode():
        given_weight, given_hessian = weight.clone(), hessian.clone()
        assert torch.equal(solve(given_weight, given_hessian, Grid(4, 32, True)).quantized.codes, expected.codes)
