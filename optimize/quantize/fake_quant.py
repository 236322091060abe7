"""Fake quantisation: a model trains with its numbers rounded to the grids that they will be stored on.

A number's code is clip(round(x / scale) + zero, low, high), and stands for (code - zero) * scale: the same arithmetic,
in float32, as that of ONNX's QuantizeLinear and DequantizeLinear, so that what is trained is what is deployed.

The gradient passes the rounding as if it were not there (the straight-through estimator: Bengio et al., 2013,
https://arxiv.org/abs/1308.3432), and stops where a number is cut off. A scale can be learnt: its gradient is that of
Learned Step Size Quantization (Esser et al., 2020, https://arxiv.org/abs/1902.08153, equation 3, with the factor of
section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Grid = tuple[float, int]
"""(scale, zero) of unsigned bytes."""
_LOW, _HIGH = 0, 255
_PLACE = "activation_grids"


class _Round(torch.autograd.Function):
    """x -> what its code stands for; `scale` and `zero` broadcast to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        codes = torch.round(steps) + zero
        inside = (codes >= low) & (codes <= high)
        meant = codes.clamp_(low, high) - zero
        slope = meant - steps * inside if ctx.needs_input_grad[1] else inside
        ctx.save_for_backward(inside, slope)
        ctx.high = high
        return meant * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inside, slope = ctx.saved_tensors
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient * slope).sum() / math.sqrt(slope.numel() * ctx.high)
        return gradient * inside, of_scale, None, None, None


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return _Round.apply(x, scale, zero, low, high)  # type: ignore[no-any-return,no-untyped-call]


class ActivationGrid(nn.Module):
    """Where the values of one activation are rounded to: unsigned bytes, one grid for the whole tensor."""

    zero: Tensor

    def __init__(self, grid: Grid, learn: bool) -> None:
        super().__init__()
        scale, zero = grid
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float32), requires_grad=learn)
        self.register_buffer("zero", torch.tensor(float(zero)))

    def forward(self, x: Tensor) -> Tensor:
        return _rounded(x, self.scale, self.zero, _LOW, _HIGH)

    @property
    def range(self) -> tuple[float, float]:
        """The numbers of the lowest and of the highest code."""
        scale, zero = self.scale.item(), self.zero.item()
        return (_LOW - zero) * scale, (_HIGH - zero) * scale


class WeightGrid:
    """Where a weight is rounded to: signed bytes, evenly around 0. It follows the weight, and cuts nothing off."""

    def __init__(self, per_channel: bool, bits: int = 8) -> None:
        self.per_channel = per_channel
        self.top = 2 ** (bits - 1) - 1

    def scale(self, weight: Tensor) -> Tensor:
        """Of a weight [rows, columns]: one for each row [rows, 1], or one for all [1, 1]."""
        largest = weight.detach().abs().amax(dim=1, keepdim=True)
        scale = (largest if self.per_channel else largest.amax(dim=0, keepdim=True)) / self.top
        return torch.where(scale > 0, scale, 1.0)

    def round(self, values: Tensor, weight: Tensor) -> Tensor:
        """`values` are the weight or, where one scale is for all, a part of it."""
        scale = self.scale(weight)
        return _rounded(values, scale, torch.zeros_like(scale), -self.top, self.top)


class FakeQuantized:
    """A model whose layers compute on rounded numbers until `remove`. Names of its weights stay as they are."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, str | None],
        grids: Mapping[str, Grid],
        *,
        per_channel: bool,
        bits: int = 8,
        learn: bool = True,
    ) -> None:
        """`layers` are linear layers and embeddings by name, each with its input's name in `grids` (None: no grid).

        With `learn` the activations' scales are parameters of the model. Embeddings have one scale for all rows.
        """
        self._model = model
        self.grids = {name: ActivationGrid(grid, learn) for name, grid in grids.items()}
        # A part of the model: so they are trained, and lie in checkpoints.
        model.add_module(_PLACE, nn.ModuleList(self.grids.values()))
        self._modules: list[Any] = [model.get_submodule(name) for name in layers]
        for module, source in zip(self._modules, layers.values(), strict=True):
            if isinstance(module, nn.Embedding):
                module.forward = partial(_embedding, module, WeightGrid(False, bits))  # type: ignore[method-assign]
            else:
                grid = self.grids[source] if source is not None else nn.Identity()
                module.forward = partial(_linear, module, WeightGrid(per_channel, bits), grid)

    def remove(self) -> None:
        """Leave the float model with its trained weights."""
        for module in self._modules:
            del module.forward
        delattr(self._model, _PLACE)


def _linear(module: nn.Linear, grid: WeightGrid, inputs: nn.Module, x: Tensor) -> Tensor:
    return functional.linear(inputs(x), grid.round(module.weight, module.weight), module.bias)


def _embedding(module: nn.Embedding, grid: WeightGrid, ids: Tensor) -> Tensor:
    # Only the rows looked up are rounded: a vocabulary is large.
    return grid.round(functional.embedding(ids, module.weight, module.padding_idx), module.weight)
