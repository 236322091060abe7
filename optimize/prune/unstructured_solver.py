"""SparseGPT's numerics, and what pruning costs, as functions of tensors that know no model and no file.

SparseGPT (Frantar and Alistarh, 2023, https://arxiv.org/abs/2301.00774) visits a weight's columns in blocks. Of a block
those weights go whose loss the columns to come can make up for at the least cost, and then they do. Its sums are those
of GPTQ, and are taken in the same form (`blockwise/hessian.py`): the paper's w^2 / [H^-1]_jj, with the inverse of what
is left of H at column j, is w^2 * D_j of H = R D R^T. To that is added a refinement: under the mask that was found, the
weights that stay are moved on towards the least error by conjugate gradients, by which no row gets worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from optimize.blockwise.abreast import each
from optimize.blockwise.hessian import factorise
from optimize.prune.unstructured_scores import Structure, least, magnitude, wanda

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.blockwise.hessian import Factors

Result = TypeVar("Result")

_ROWS = 96
"""Rows that a thread of the CPU works on at a time: fixed, so that no result depends on how many threads there are."""


@dataclass(frozen=True)
class Pruned:
    """A weight [out, in] with zeros."""

    weight: Tensor
    """float32."""
    error: float
    """tr(dW H dW^T) / tr(W H W^T), the share of the output's power that pruning costs; 0 where there is no output."""
    magnitude_error: float
    """The same of pruning by magnitude, with zeros in the same structure."""
    damp_percent: float = 0.0
    """What SparseGPT used: more than asked for where the Hessian was too near to singular."""


def prune_wanda(weights: Sequence[Tensor], hessian: Tensor, structure: Structure) -> list[Pruned]:
    """Wanda of weights [out, in], float32, of layers that are given the same inputs, of second moment [in, in]."""
    found = [weight.masked_fill(wanda(weight, hessian, structure), 0) for weight in weights]
    return [_measured(weight, one, hessian, structure) for weight, one in zip(weights, found, strict=True)]


def prune_sparsegpt(
    weights: Sequence[Tensor],
    hessian: Tensor,
    structure: Structure,
    *,
    damp_percent: float = 0.01,
    block_size: int = 128,
    refine: int = 10,
    sparse: Sequence[bool] | None = None,
) -> list[Pruned]:
    """SparseGPT of weights [out, in], float32, of layers that are given the same inputs, on their device.

    hessian: the inputs' second moment [in, in].
    damp_percent: share of the Hessian's mean diagonal that is added to the diagonal; doubled while it can't be
        factorised, up to 1.
    block_size: columns that a mask is chosen for at a time; with N:M it is a matter of speed alone.
    refine: steps of conjugate gradients; with 0 this is SparseGPT as it was published.
    sparse: for each weight, whether its zeros are a mask already, which then stays.

    Raises `StageError` where the Hessian is not finite, or can't be factorised.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():  # what is made here is changed in place by other threads
        hessian = hessian.float()
        factors = factorise(hessian, torch.arange(len(hessian), device=hessian.device), damp_percent)
        found = []
        for weight, masked in zip(weights, sparse or [False] * len(weights), strict=True):
            problem = _Problem(weight.contiguous(), hessian, factors, structure)
            if masked:
                problem.pruned |= weight == 0
            problem.sweep(block_size)
            problem.refine(refine)
            found.append(_measured(weight, problem.values, hessian, structure, factors.damp_percent))
        return found


class _Problem:
    """One weight [out, in], and what becomes of it."""

    def __init__(self, weight: Tensor, hessian: Tensor, factors: Factors, structure: Structure) -> None:
        import torch

        self.weight, self.hessian, self.factors, self.structure = weight, hessian, factors, structure
        self.variances = factors.variances.masked_fill(hessian.diagonal() == 0, 0)
        """What is never put in costs nothing, and goes first."""
        self.pruned = torch.zeros_like(weight, dtype=torch.bool)
        self.values = torch.empty_like(weight)
        self.loss = torch.empty_like(weight)
        """weight - values"""

    def sweep(self, block_size: int) -> None:
        """The paper's Algorithm 1: masks, and values for what stays."""
        structure, width = self.structure, self.weight.shape[1]
        size = max(block_size // structure.of, 1) * structure.of if structure.of else block_size
        target = self.weight.clone()
        for start in range(0, width, size):
            part = slice(start, min(start + size, width))
            self._pass_on(target, part)
            if not structure.of:
                self._choose(target[:, part], part)
            self._sweep(target, part)

    def _pass_on(self, target: Tensor, part: slice) -> None:
        """What earlier blocks lost."""
        feedback = self.factors.feedback[: part.start, part]

        def add(rows: slice) -> None:
            target[rows, part].addmm_(self.loss[rows, : part.start], feedback)

        if part.start:
            _by_rows(add, target)

    def _choose(self, target: Tensor, part: slice) -> None:
        """What goes of a block, out of all rows together.

        What a weight would become is known only once those on its left are: for now all of them are taken to stay.
        """
        import torch

        scores = torch.empty_like(target)
        unit = self.factors.feedback[part, part].triu(1)
        unit.diagonal().fill_(1)

        def ahead(rows: slice) -> None:
            weight = self.weight[rows, part]
            moved = torch.linalg.solve_triangular(
                unit, target[rows] - weight, upper=True, left=False, unitriangular=True
            )
            scores[rows] = (weight + moved).square() * self.variances[part]

        _by_rows(ahead, target)
        scores.masked_fill_(self.pruned[:, part], -1)  # a mask that is there already comes first
        upto = [round(self.structure.sparsity * len(target) * column) for column in (part.start, part.stop)]
        self.pruned[:, part] |= least(scores.reshape(1, -1), upto[1] - upto[0]).view(scores.shape)

    def _sweep(self, target: Tensor, part: slice) -> None:
        """Compiled on the CPU, batched on an accelerator."""
        feedback, variances = self.factors.feedback[part, part], self.variances[part]
        counts = (self.structure.zeros, self.structure.of)

        def sweep(rows: slice) -> None:
            given = (self.weight[rows, part], target[rows, part], feedback, variances)
            written = (self.pruned[rows, part], self.values[rows, part], self.loss[rows, part])
            if target.is_cuda:
                from optimize.prune import unstructured_batched

                unstructured_batched.sweep(*given, *counts, *written)
            else:
                from optimize.prune import unstructured_kernels

                kernel: Callable[..., None] = unstructured_kernels.sweep
                kernel(*(values.numpy() for values in given), *counts, *(values.numpy() for values in written))

        _by_rows(sweep, target)

    def refine(self, steps: int) -> None:
        """Move the values that stay on towards the least loss (hessian + ridge) loss^T. `loss` is not kept up."""
        if steps:
            _by_rows(lambda rows: self._descend(rows, steps), self.values)

    def _descend(self, rows: slice, steps: int) -> None:
        """Conjugate gradients, preconditioned by the diagonal: inputs differ in size by orders of magnitude."""
        values, pruned, ridge = self.values[rows], self.pruned[rows], self.factors.ridge
        diagonal = self.hessian.diagonal() + ridge

        def times(matrix: Tensor) -> Tensor:
            """matrix @ (hessian + ridge), as far as values may move."""
            return (matrix @ self.hessian).add_(matrix, alpha=ridge).masked_fill_(pruned, 0)

        residual = times(self.loss[rows])
        direction = residual / diagonal
        power = _product(residual, direction)
        for _ in range(steps):
            image = times(direction)
            length = power / _product(direction, image).clamp(min=1e-30)
            values += length[:, None] * direction
            residual -= length[:, None] * image
            scaled = residual / diagonal
            before, power = power, _product(residual, scaled)
            direction = direction.mul_((power / before.clamp(min=1e-30))[:, None]).add_(scaled)


def _measured(
    weight: Tensor, values: Tensor, hessian: Tensor, structure: Structure, damp_percent: float = 0.0
) -> Pruned:
    """What the zeros cost, beside what magnitude's would."""
    lost, smallest = weight - values, weight.masked_fill(~magnitude(weight, structure), 0)

    def energies(rows: slice) -> list[float]:
        return [float(_product(one[rows] @ hessian, one[rows]).double().sum()) for one in (lost, smallest, weight)]

    ours, theirs, whole = (sum(parts) for parts in zip(*_by_rows(energies, weight), strict=True))
    return Pruned(values, ours / whole if whole else 0.0, theirs / whole if whole else 0.0, damp_percent)


def _by_rows(function: Callable[[slice], Result], weight: Tensor) -> list[Result]:
    """`function` of all rows, a few at a time on each thread of the CPU, all at once on an accelerator."""
    step = _ROWS if weight.device.type == "cpu" else len(weight)
    return each(function, [slice(start, start + step) for start in range(0, len(weight), step)])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Row by row."""
    return (left * right).sum(dim=1)
