"""The numerics of GPTQ: grids and rounding, as functions of tensors that know no model and no file.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) rounds a weight matrix one input column after the other
and moves what rounding lost onto the columns still to come, so that the layer's *output* changes least:
tr(dW H dW^T), where H is the second moment of the layer's inputs. `solve` does the same sums in the form of LDLQ (Chee
et al., 2023, https://arxiv.org/abs/2307.13304, Theorem 6), which needs one Cholesky factor and no inverse, and adds

- a search of each group's grid, in which an input counts by its conditional variance (D of H = R D R^T): that is what
  a loss costs which inputs to come can't make good, and it serves far better than the diagonal of H;
- symmetric grids whose scale may be negative: of the 2^bits codes one more lies below zero than above, and the longer
  side is turned to where the group's largest weights are;
- rounds of refining, in which every step lowers the error: scales by least squares under the codes as they are, then
  each code the best while all others stay (coordinate descent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from optimize.blockwise.abreast import each
from optimize.blockwise.hessian import factorise
from optimize.quantize.gptq_grid import Grid, Quantized, candidates, nearest, round_to_nearest, storable

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.blockwise.hessian import Factors

__all__ = ["Grid", "Quantized", "Solution", "round_to_nearest", "solve", "solve_all"]

_ROWS = 192
"""Rows that a thread of the CPU solves at a time: fixed, so that no result depends on how many threads there are."""
_DESCENTS = 2
"""Passes over the codes a round of refining: they cost little beside the least squares of the scales."""


@dataclass(frozen=True)
class Solution:
    """What `solve` found."""

    quantized: Quantized
    error: float
    """tr(dW H dW^T) / tr(W H W^T), the share of the output's power that rounding costs; 0 where there is no output."""
    rtn_error: float
    """The same of rounding to nearest on the grid that the search gave."""
    rtn_rows: int
    """Outputs that rounding to nearest served better, and which are stored so: `error` is never above `rtn_error`."""
    damp_percent: float
    """What was used: more than asked for where the Hessian was too near to singular."""
    dead: int
    """Inputs that were 0 throughout calibration; their weights are rounded to nearest."""


def solve(weight: Tensor, hessian: Tensor, grid: Grid, **options: Any) -> Solution:
    """`solve_all` of a single weight [out, in]."""
    return solve_all([weight], hessian, grid, **options)[0]


def solve_all(
    weights: Sequence[Tensor],
    hessian: Tensor,
    grid: Grid,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = True,
    static_groups: bool = True,
    block_size: int = 128,
    scale_search: bool = True,
    refine: int = 2,
    sparse: Sequence[bool] | None = None,
) -> list[Solution]:
    """Quantise weights [out, in], of any float type, of layers that are given the same inputs, on their device.

    hessian: the inputs' second moment [in, in].
    damp_percent: share of the Hessian's mean diagonal that is added to the diagonal; doubled while it can't be
        factorised, up to 1.
    desc_act: take the columns in the order of falling diagonal instead of their own.
    static_groups: groups are of neighbouring columns. Without it, and with `desc_act`, they are of columns that follow
        each other in that order, so that `group_of` jumps about: a little better, and slower to infer with.
    block_size: columns after which what was lost is passed on to all that follow; a matter of speed.
    scale_search: look for the grid of each group that loses least; otherwise it spans smallest and largest weight.
    refine: rounds of refining; with 0 and without search this is textbook GPTQ.
    sparse: for each weight, whether its zeros are a mask that must stay; every grid has an exact 0.

    Raises `StageError` where the Hessian is not finite, or can't be factorised.
    """
    import torch

    hessian = hessian.float()
    width = len(hessian)
    layout = inputs = torch.arange(width, device=hessian.device)
    order = hessian.diagonal().argsort(descending=True, stable=True) if desc_act else inputs
    if not static_groups:  # groups that follow the order make the same problem, with its columns laid out anew
        layout, order = order, inputs
        hessian = hessian[layout][:, layout]
    factors = factorise(hessian, order, damp_percent)
    matrix = hessian.clone()
    matrix.diagonal().add_(factors.ridge)
    problem = _Problem(grid, hessian, matrix, factors, order, block_size, scale_search, refine)
    back = layout.argsort()

    def solve_rows(rows: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
        weight = rows[0].detach().float()[:, layout]
        free = weight != 0 if rows[1] else torch.ones_like(weight, dtype=torch.bool)
        codes, *others = problem.solve(weight, free)
        return codes[:, back], *others

    pieces = [torch.split(weight, _ROWS if weight.device.type == "cpu" else len(weight)) for weight in weights]
    masked = sparse or [False] * len(weights)
    rows = [(piece, mask) for split, mask in zip(pieces, masked, strict=True) for piece in split]
    parts = iter(each(solve_rows, rows) if hessian.device.type == "cpu" else map(solve_rows, rows))
    solutions = []
    for split in pieces:
        codes, scales, zeros, ours, theirs, whole = map(torch.cat, zip(*islice(parts, len(split)), strict=True))
        total = float(whole.double().sum())
        solutions.append(
            Solution(
                quantized=Quantized(codes, scales, zeros, group_of=(back // grid.size(width)).to(torch.int32)),
                error=float(torch.minimum(ours, theirs).double().sum()) / total if total else 0.0,
                rtn_error=float(theirs.double().sum()) / total if total else 0.0,
                rtn_rows=int((theirs < ours).sum()),
                damp_percent=factors.damp_percent,
                dead=int((hessian.diagonal() == 0).sum()),
            )
        )
    return solutions


@dataclass(frozen=True)
class _Problem:
    """What all rows of a weight share. Columns are laid out so that groups are of neighbours."""

    grid: Grid
    hessian: Tensor
    matrix: Tensor
    """The Hessian with the ridge added to its diagonal: what is minimised is tr(dW matrix dW^T)."""
    factors: Factors
    order: Tensor
    block_size: int
    scale_search: bool
    refine: int

    def solve(self, weight: Tensor, free: Tensor) -> tuple[Tensor, ...]:
        """Some rows' codes, scales and zeros; then their errors, those of rounding to nearest, and what they are of.

        Weights that are not `free` are 0, and stay it.
        """
        import torch

        grid, size = self.grid, self.grid.size(weight.shape[1])
        group_of = torch.arange(weight.shape[1], device=weight.device) // size
        choice = candidates(weight, grid, self.scale_search)
        best = torch.zeros_like(choice[0][..., 0], dtype=torch.int64)
        _kernel("choose", weight, self.factors.variances, size, *choice, grid.top, best)
        scales, zeros = (values.gather(2, best[..., None])[..., 0] for values in choice)
        rounded, rounded_scales = nearest(weight, scales, zeros, group_of, grid), scales.clone()
        rounded_loss = weight - scales[:, group_of] * (rounded - zeros[:, group_of])
        rounded_error = _product(rounded_loss @ self.hessian, rounded_loss)
        codes, loss = self._sweep(weight, free, scales[:, group_of], zeros[:, group_of])
        gradient = loss @ self.matrix
        for _ in range(self.refine):
            self._refit(codes, loss, gradient, scales, zeros)
            for _ in range(_DESCENTS):
                grids = (group_of, scales, zeros, grid.top)
                _kernel("descend", codes, loss, gradient, self.matrix, free, self.order, *grids)
        error = _product(gradient - self.factors.ridge * loss, loss).clamp(min=0)
        better = (error <= rounded_error)[:, None]
        codes, scales = codes.where(better, rounded), scales.where(better, rounded_scales)
        whole = _product(weight @ self.hessian, weight)
        return codes.to(torch.uint8), scales, zeros.to(torch.uint8), error, rounded_error, whole

    def _sweep(self, weight: Tensor, free: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """GPTQ's column loop. Codes, and the weight less what they stand for, [rows, in]; so are scales and zeros."""
        import torch

        weight, free, scales, zeros = (values[:, self.order] for values in (weight, free, scales, zeros))
        target, codes, loss = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
        feedback = self.factors.feedback
        for start in range(0, weight.shape[1], self.block_size):
            part = slice(start, start + self.block_size)
            target[:, part].addmm_(loss[:, :start], feedback[:start, part])
            block = (weight[:, part], target[:, part], free[:, part], feedback[part, part])
            _kernel("sweep", *block, scales[:, part], zeros[:, part], self.grid.top, codes[:, part], loss[:, part])
        back = self.order.argsort()
        return codes[:, back], loss[:, back]

    def _refit(self, codes: Tensor, loss: Tensor, gradient: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Each group's scale by least squares under its codes, one group after the other, where that is an advance."""
        width = codes.shape[1]
        size = self.grid.size(width)
        for group in range(scales.shape[1]):
            part = slice(group * size, (group + 1) * size)
            steps = codes[:, part] - zeros[:, group, None]
            slope = _product(gradient[:, part], steps)
            curvature = _product(steps @ self.matrix[part, part], steps)
            old = scales[:, group]
            new = storable(old + slope / curvature.clamp(min=1e-30))
            change = new - old
            advance = change * (change * curvature - 2 * slope) < 0  # rounding may have spoilt it
            scales[:, group] = new.where(advance, old)
            gain = steps.mul_(change.where(advance, 0)[:, None])
            loss[:, part] -= gain
            gradient.addmm_(gain, self.matrix[part], alpha=-1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Row by row."""
    return (left * right).sum(dim=1)


def _kernel(name: str, *arguments: Tensor | float) -> None:
    """Compiled on the CPU, batched on an accelerator."""
    import torch

    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if tensors[0].is_cuda:
        from optimize.quantize import gptq_batched

        getattr(gptq_batched, name)(*arguments)
    else:
        from optimize.quantize import gptq_kernels

        getattr(gptq_kernels, name)(*(v.numpy() if isinstance(v, torch.Tensor) else v for v in arguments))
