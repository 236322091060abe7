"""Codes in the layout of ONNX Runtime's operators: the numbers of the checkpoint, in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimize.errors import StageError
from optimize.export import nbits
from optimize.quantize.gptq_grid import Grid, round_to_nearest


@pytest.mark.parametrize(
    ("bits", "group_size", "largest", "block"),
    [(2, 32, 64, 32), (3, 96, 128, 32), (4, -1, 128, 64), (4, 128, 128, 128), (4, 64, 16, 16), (8, 48, 64, 16)],
)
def test_packed_codes_stand_for_the_same_numbers(bits: int, group_size: int, largest: int, block: int) -> None:
    weight = torch.randn(7, 192, generator=torch.Generator().manual_seed(0))
    quantized = round_to_nearest(weight, Grid(bits, group_size, sym=True))
    packed = nbits.pack(quantized, bits, largest)
    assert (packed.block, packed.order) == (block, None)
    stored = packed.stored_bits
    codes = np.stack([packed.codes.numpy() >> shift & (2**stored - 1) for shift in range(0, 8, stored)], axis=-1)
    np.testing.assert_array_equal(codes.reshape(7, -1)[:, :192], quantized.codes.numpy())
    middle = 2 ** (stored - 1)
    assert (packed.zeros is None) == bool((quantized.zeros == middle).all())
    expected = quantized.scales[:, quantized.group_of[::block].long()]
    assert torch.equal(packed.scales, expected)


def test_groups_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(StageError, match="groups that start at input 24 can't be cut into blocks"):
        nbits.pack(round_to_nearest(torch.randn(8, 96), Grid(4, 24, sym=False)), 4, 32)


def test_a_head_in_8_bits_is_within_a_step() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    head = nbits.round_to_nearest(weight, 8, 64)
    steps = head.scales.abs().repeat_interleave(64, dim=1)
    assert bool(((head.dequantize() - weight).abs() <= 1.001 * steps).all())
