"""Grids of integer codes for a weight matrix: what codes mean, which grids there are to choose from, and rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LEAST, _MOST = 2.0**-24, 65504.0
"""The range of a float16, as which scales are stored."""


@dataclass(frozen=True)
class Grid:
    """What codes mean: `bits` 2, 3, 4 or 8; a scale and a zero point for `group_size` inputs of a row (-1: all)."""

    bits: int
    group_size: int
    sym: bool

    def size(self, width: int) -> int:
        """Inputs in a group of a row of `width`."""
        return width if self.group_size == -1 else min(self.group_size, width)

    def groups(self, width: int) -> int:
        """Groups of a row of `width` inputs; the last one may be smaller."""
        return -(-width // self.size(width))

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] as integer codes."""

    codes: Tensor
    """uint8 [out, in], below 2^bits."""
    scales: Tensor
    """float32 [out, groups], each exactly a float16; of a symmetric grid it may be negative."""
    zeros: Tensor
    """uint8 [out, groups], 1 to 2^bits - 1 (the checkpoint stores one less)."""
    group_of: Tensor
    """int32 [in]: the group of each input."""

    def dequantize(self) -> Tensor:
        """float32 [out, in]: scales * (codes - zeros)."""
        group_of = self.group_of.long()
        return self.scales[:, group_of] * (self.codes.float() - self.zeros.float()[:, group_of])


def round_to_nearest(weight: Tensor, grid: Grid) -> Quantized:
    """Each weight of [out, in] to the nearest code; a group's grid spans its smallest and largest weight and 0."""
    import torch

    weight = weight.detach().float()
    width = weight.shape[1]
    group_of = torch.arange(width, device=weight.device) // grid.size(width)
    scales, zeros = (values[..., 0] for values in candidates(weight, grid, search=False))
    codes = nearest(weight, scales, zeros, group_of, grid)
    return Quantized(codes.to(torch.uint8), scales, zeros.to(torch.uint8), group_of.int())


def candidates(weight: Tensor, grid: Grid, search: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points to choose among, float32 [rows, groups, candidates]; the first spans all weights and 0."""
    import torch

    width = weight.shape[1]
    size, groups = grid.size(width), grid.groups(width)
    padded = torch.nn.functional.pad(weight, (0, groups * size - width)).view(len(weight), groups, size)
    low, high = padded.amin(dim=2, keepdim=True).clamp(max=0), padded.amax(dim=2, keepdim=True).clamp(min=0)
    if grid.sym:
        largest = torch.maximum(-low, high)
        factors = [1 / (grid.middle - 0.5)]
        if search:
            shrinks = [(1.14 - 0.04 * step) / grid.middle for step in range(21)]
            factors += shrinks + [-factor for factor in shrinks]
        scales = storable(largest * torch.tensor(factors, device=weight.device))
        return scales, torch.full_like(scales, grid.middle)
    parts = torch.tensor([1 - 0.03 * step for step in range(25 if search else 1)], device=weight.device)
    scales = storable((high - low) * parts / grid.top)
    zeros = (-low * parts / scales).round()
    if search:
        scales, zeros = scales.repeat(1, 1, 3), torch.cat([zeros, zeros - 1, zeros + 1], dim=2)
    return scales, zeros.clamp(1, grid.top)


def storable(scales: Tensor) -> Tensor:
    """The nearest float16s, as float32, of the same signs and none of them 0."""
    return scales.abs().clamp(_LEAST, _MOST).copysign(scales).half().float()


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, grid: Grid) -> Tensor:
    """Each weight's nearest code, as float32 [rows, width]."""
    return ((weight / scales[:, group_of]).round() + zeros[:, group_of]).clamp(0, grid.top)
