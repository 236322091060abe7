"""Fake quantisation for torchao: linear layers train on the numbers that `Int8Tensor`, which ships, makes of theirs.

torchao's own fake quantiser of integers rounds otherwise than that tensor does (it divides the largest weight by 127.5
with other bounds, and knows no even codes for each token), so that layers are torchao's `FakeQuantizedLinear` and what
rounds in them is here.

The gradient passes the rounding as if it were not there (the straight-through estimator: Bengio et al., 2013,
https://arxiv.org/abs/1308.3432). Ranges follow the numbers, so that none is cut off by more than half a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
from torchao.quantization.qat.linear import FakeQuantizedLinear
from torchao.quantization.quant_primitives import MappingType


class _Round(torch.autograd.Function):
    """x -> what its codes stand for, with a scale for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mapping: Any, reduce_range: bool) -> Tensor:
        rounded: Tensor = Int8Tensor.from_hp(x, PerRow(), mapping_type=mapping, reduce_range=reduce_range).dequantize()
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


class Rounding(FakeQuantizerBase):  # type: ignore[misc]
    """Rows of signed bytes: the outputs of a weight, or an activation's tokens."""

    def __init__(self, *, sym: bool, reduce_range: bool) -> None:
        super().__init__()
        self.config = None
        self._mapping = MappingType.SYMMETRIC if sym else MappingType.ASYMMETRIC
        self._reduce_range = reduce_range

    def forward(self, x: Tensor) -> Tensor:
        return _Round.apply(x, self._mapping, self._reduce_range)  # type: ignore[no-any-return,no-untyped-call]


def prepare(model: nn.Module, layers: Iterable[str], *, sym: bool, reduce_range: bool) -> None:
    """Have these linear layers compute on rounded numbers: weights with even codes, activations with such if `sym`.

    Parameters stay the same objects, under the same names.
    """
    for name in layers:
        rounded = FakeQuantizedLinear.from_linear(model.get_submodule(name))
        rounded.weight_fake_quantizer = Rounding(sym=True, reduce_range=reduce_range)
        rounded.activation_fake_quantizer = Rounding(sym=sym, reduce_range=reduce_range)
        model.set_submodule(name, rounded)


def restore(model: nn.Module, layers: Iterable[str]) -> None:
    """Leave the float model with its trained weights."""
    for name in layers:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, layer.to_linear())
