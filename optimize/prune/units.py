"""What structured pruning removes: units (a head, a channel) of a dimension (one layer's heads), out of every tensor
that they reach into.

Which tensors these are, `dependency.py` finds out. Here are plain functions on modules: a dimension names its modules,
so that it serves a copy of the model as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["heads", "ffn", "hidden", "channels"]
"""`heads`: of attention, with the keys and values that queries share; `ffn`: the inner width of a feed-forward layer;
`hidden`: the width of what runs from block to block; `channels`: of convolutions."""
Dropped = Mapping[str, Sequence[int]]
"""Name of a dimension -> its units that go."""


@dataclass(frozen=True)
class Slice:
    """Where a dimension's units lie in one module, or in a parameter of its own."""

    name: str
    side: Literal["in", "out", "parameter"]
    """A layer that reads the units is cut on its `in` side; all else that has them on `out`."""
    channels: tuple[tuple[int, ...], ...]
    """Of each unit."""
    cut: Callable[[Any, list[int]], Any] | None
    """torch-pruning's function that removes channels of such a module; None for a parameter."""
    dim: int = 0
    """Of a parameter."""

    def of(self, units: Collection[int]) -> list[int]:
        return sorted(channel for unit in units for channel in self.channels[unit])


@dataclass(frozen=True)
class Dimension:
    """Units of one kind that stand side by side: the heads of a layer, the channels of a convolution."""

    name: str
    """Of the layer that reads them, or of the convolution that makes them."""
    kind: Kind
    units: int
    slices: tuple[Slice, ...]

    @property
    def layers(self) -> list[str]:
        """What `targets` and `ignore` match."""
        return [part.name for part in self.slices]

    @property
    def readers(self) -> list[Slice]:
        return [part for part in self.slices if part.side == "in"]


_COUNTS: Mapping[str, tuple[str, ...]] = {
    "heads": ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "all_head_size", "inner_dim"),
    "ffn": ("intermediate_size", "ffn_dim", "hidden_dim", "mlp_dim"),
    "hidden": ("hidden_size", "embed_dim", "dim"),
}
"""What modules of transformers call the numbers that they keep of their units."""


def drop(model: Any, dimensions: Sequence[Dimension], dropped: Dropped) -> None:
    """Remove units from a model, in place."""
    import torch

    for dimension in dimensions:
        units = dropped.get(dimension.name)
        _recount(model, dimension, dimension.units - len(units or ()))
        for part in dimension.slices if units else ():
            gone = part.of(units or ())
            if part.cut is not None:
                part.cut(model.get_submodule(part.name), gone)
                continue
            owner, _, key = part.name.rpartition(".")
            old = model.get_parameter(part.name)
            kept = torch.tensor([i for i in range(old.shape[part.dim]) if i not in set(gone)], device=old.device)
            new = torch.nn.Parameter(old.detach().index_select(part.dim, kept))
            setattr(model.get_submodule(owner), key, new)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # each of a pair was cut by itself


def _recount(model: nn.Module, dimension: Dimension, left: int) -> None:
    """Have the modules around the layers know how many units there are."""
    near = {part.name.rpartition(".")[0] for part in dimension.slices}
    # The hidden width is the same everywhere.
    for module in model.modules() if dimension.kind == "hidden" else map(model.get_submodule, near):
        for key in _COUNTS.get(dimension.kind, ()):
            count = vars(module).get(key)
            if isinstance(count, int) and count % dimension.units == 0:
                setattr(module, key, count * left // dimension.units)


def mask(model: nn.Module, dimensions: Sequence[Dimension], dropped: Dropped) -> None:
    """Leave the units where they are, and have nobody read them: weights of their readers become zero, in place."""
    import torch

    for dimension in dimensions:
        for part in dimension.readers if dropped.get(dimension.name) else ():
            weight: Tensor = model.get_submodule(part.name).weight  # type: ignore[assignment]
            with torch.no_grad():
                weight[:, part.of(dropped[dimension.name])] = 0
