"""Which weights go: pruning scores and masks, as functions of tensors.

- magnitude: the smallest |w| of a layer go, or of all layers together (Han et al., 2015,
  https://arxiv.org/abs/1506.02626);
- Wanda (Sun et al., 2023, https://arxiv.org/abs/2306.11695): of each output's weights those go with the least |w| times
  the norm of their input.

N:M masks have exactly N zeros in every M consecutive inputs, as SparseGPT counts. A mask is bool, true for what goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 64
"""Columns up to which sorting a row is quicker than looking for its n-th value."""


@dataclass(frozen=True)
class Structure:
    """How many weights go: a share of them, or `zeros` of every `of` consecutive inputs (0: anywhere)."""

    sparsity: float
    zeros: int = 0
    of: int = 0


def magnitude(weight: Tensor, structure: Structure) -> Tensor:
    """Mask of the smallest weights of a layer [out, in]."""
    size = weight.abs()
    if structure.of:
        return _in_groups(size, structure)
    return least(size.reshape(1, -1), round(structure.sparsity * size.numel())).view(size.shape)


def wanda(weight: Tensor, hessian: Tensor, structure: Structure) -> Tensor:
    """Mask of the weights [out, in] with the least |w| * norm of the input, for each output alone.

    hessian: the inputs' second moment [in, in]; the root of its diagonal is their norm, but for a factor.
    """
    scores = weight.abs() * hessian.diagonal().sqrt()
    if structure.of:
        return _in_groups(scores, structure)
    return least(scores, round(structure.sparsity * weight.shape[1]))


def least(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` least of each row; of equal ones the first."""
    import torch

    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.shape[1] <= _FEW:
        chosen = scores.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    last = scores.kthvalue(count, dim=1, keepdim=True).values
    smaller, ties = scores < last, scores == last
    wanted = count - smaller.sum(dim=1, keepdim=True)
    if bool((ties.sum(dim=1, keepdim=True) > wanted).any()):
        ties &= ties.cumsum(dim=1, dtype=torch.int32) <= wanted
    return smaller | ties


def cut(tensors: Callable[[], Iterable[Tensor]], sparsity: float) -> tuple[float, float]:
    """Where to cut the magnitudes of all weights together: (what is smaller goes, share of what is just as large that
    goes as well). Goes through the tensors twice and keeps none.

    Magnitudes of float32 are in the order of their bits as integers: counts of the upper half of the bits, then of the
    lower half among those that share the upper one, find the one at any place exactly.
    """
    import torch

    def counts(upper: int | None) -> Tensor:
        found = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in tensors():
            bits = tensor.detach().float().abs().cpu().reshape(-1).contiguous().view(torch.int32)
            chosen = bits >> 16 if upper is None else bits[bits >> 16 == upper] & 0xFFFF
            found += torch.bincount(chosen, minlength=1 << 16)
        return found

    whole = counts(None)
    wanted = round(sparsity * int(whole.sum()))
    upper = _place(whole, wanted)
    rest = wanted - int(whole[:upper].sum())
    parts = counts(upper)
    lower = _place(parts, rest)
    value = torch.tensor([(upper << 16) | lower], dtype=torch.int32).view(torch.float32)
    return float(value), (rest - int(parts[:lower].sum())) / max(int(parts[lower]), 1)


def below(weight: Tensor, value: float, share: float) -> Tensor:
    """Mask of a weight [out, in] cut at `value`, with a share of what is just as large."""
    import torch

    size = weight.float().abs()
    smaller, ties = size < value, size == value
    taken = round(share * int(ties.sum()))
    return smaller | (ties & (ties.reshape(-1).cumsum(0, dtype=torch.int32).view(ties.shape) <= taken))


def _place(counts: Tensor, wanted: int) -> int:
    """The bin that holds the last of the first `wanted`."""
    import torch

    return min(int(torch.searchsorted(counts.cumsum(0), max(wanted, 1))), len(counts) - 1)


def _in_groups(scores: Tensor, structure: Structure) -> Tensor:
    """The least `zeros` of every `of` columns."""
    return least(scores.reshape(-1, structure.of), structure.zeros).view(scores.shape)
