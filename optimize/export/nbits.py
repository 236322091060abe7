"""Weights as ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` want them: codes in blocks along the inputs.

A row's codes of `bits` (2, 4 or 8) bits fill bytes from the lowest bits up, block after block. A block holds a power of
two of inputs, 16 or more, so a group of a GPTQ checkpoint becomes several blocks with the same scale and zero point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optimize.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.quantize.gptq_solver import Quantized


@dataclass(frozen=True)
class Packed:
    """A weight [out, in] in the layout of `MatMulNBits`."""

    codes: Tensor
    """uint8 [out, blocks, block * bits / 8]; where `in` is no multiple of `block`, the last block ends in zeros."""
    scales: Tensor
    """float32 [out, blocks]."""
    zeros: Tensor | None
    """Packed zero points, uint8 [out, ceil(blocks * bits / 8)]; None where each is 2^(bits - 1)."""
    order: Tensor | None
    """int64 [in]: which input stands where, for channels that had to move together with their group."""
    bits: int
    """Of the grid: 2, 3, 4 or 8."""
    block: int
    width: int
    """`in`."""

    @property
    def stored_bits(self) -> int:
        """Of a code in the file: the operator has no 3 bits."""
        return 4 if self.bits == 3 else self.bits

    def dequantize(self) -> Tensor:
        """float32 [out, in], of a weight without `zeros` and `order`."""
        import torch

        bits = self.stored_bits
        shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
        codes = (self.codes.unsqueeze(-1) >> shifts & (2**bits - 1)).flatten(-2)
        values: Tensor = (codes.float() - 2 ** (bits - 1)) * self.scales.unsqueeze(-1)
        return values.flatten(1)[:, : self.width]


@dataclass(frozen=True)
class Bnb4:
    """A weight [out, in] in the layout of `MatMulBnb4`, which is that of bitsandbytes."""

    codes: Tensor
    """uint8 [out * in / 2], the first of two in the high bits."""
    absmax: Tensor
    """float32 [out * in / block]."""
    block: int
    nf4: bool
    """Else FP4."""
    height: int
    """`out`."""
    width: int
    """`in`."""


def pack(quantized: Quantized, bits: int, largest: int) -> Packed:
    """The same numbers in blocks of at most `largest` inputs; 3-bit codes take 4.

    Raises `StageError` where groups can't be cut into blocks.
    """
    import torch

    group_of = quantized.group_of.long()
    codes, order = quantized.codes, None
    if bool((group_of[1:] < group_of[:-1]).any()):
        order = torch.argsort(group_of, stable=True)
        codes, group_of = codes[:, order], group_of[order]
    width = len(group_of)
    starts = [0, *(1 + (group_of[1:] != group_of[:-1]).nonzero().flatten()).tolist()]
    block = _block(starts, width, largest)
    stored = 4 if bits == 3 else bits
    at = group_of[::block]
    zeros = quantized.zeros[:, at]
    return Packed(
        codes=_bytes(_padded(codes, block), stored).reshape(len(codes), len(at), -1),
        scales=quantized.scales[:, at].contiguous(),
        zeros=None if bool((zeros == 2 ** (stored - 1)).all()) else _bytes(zeros, stored),
        order=order,
        bits=bits,
        block=block,
        width=width,
    )


def round_to_nearest(weight: Tensor, bits: int, block: int = 32) -> Packed:
    """Each block on a grid around zero whose last code is its largest magnitude (`in` a multiple of `block`)."""
    import torch

    middle = 2 ** (bits - 1)
    blocks = weight.detach().to(torch.float32).reshape(len(weight), -1, block)
    # The extreme keeps its sign and takes code 0 (= -middle): one level more than with scales of one sign.
    extreme = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    scales = extreme / -middle
    codes = (blocks / torch.where(scales == 0, 1, scales)).round_().clamp_(-middle, middle - 1).add_(middle)
    codes = codes.to(torch.uint8)
    return Packed(_bytes(codes, bits), scales.squeeze(2), None, None, bits, block, weight.shape[1])


def rows(codes: Tensor, scales: Tensor, largest: int) -> Packed:
    """Signed 8-bit codes [out, in] with a scale a row [out]: the layout of LLM.int8()."""
    import torch

    width = codes.shape[1]
    block = _block([0], width, largest)
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    blocks = _padded(unsigned, block).reshape(len(codes), -1, block)
    return Packed(blocks, scales[:, None].repeat(1, blocks.shape[1]), None, None, 8, block, width)


def joined(parts: Sequence[Packed]) -> Packed | None:
    """Weights that take the same inputs as one, their rows after each other; None where their layouts differ."""
    import torch

    first, *others = parts
    if not others:
        return None
    for part in others:
        same_order = part.order is first.order or (
            part.order is not None and first.order is not None and torch.equal(part.order, first.order)
        )
        if (part.bits, part.block, part.width) != (first.bits, first.block, first.width) or not same_order:
            return None
    zeros: Tensor | None = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([_middles(part) if part.zeros is None else part.zeros for part in parts])
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=zeros,
    )


def _middles(packed: Packed) -> Tensor:
    import torch

    return _bytes(torch.full_like(packed.scales, 2 ** (packed.stored_bits - 1), dtype=torch.uint8), packed.stored_bits)


def _block(starts: Sequence[int], width: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides every group's start (one group: that divides the width)."""
    common = math.gcd(*starts) or width
    block = min(common & -common, largest)
    if block < 16:
        raise StageError(
            f"groups that start at input {starts[1] if len(starts) > 1 else width} can't be cut into blocks of a power "
            "of two, 16 or more, which ONNX Runtime's 4-bit operator needs",
            hint="quantise with a group_size that is a multiple of 16, such as 32, 64 or 96",
        )
    return block


def _padded(codes: Tensor, block: int) -> Tensor:
    import torch

    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % block))


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., n] -> uint8 [..., ceil(n * bits / 8)], the lowest bits first."""
    each = 8 // bits
    codes = _padded(codes.reshape(-1, codes.shape[-1]), each).reshape(*codes.shape[:-1], -1, each)
    packed = codes[..., 0].clone()
    for position in range(1, each):
        packed |= codes[..., position] << (bits * position)
    return packed
