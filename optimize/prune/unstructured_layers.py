"""What pruning makes of layers that share their inputs: weights with zeros, and a row of the table of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optimize.blockwise.sequence import Changed, Moment, oriented, rounded
from optimize.prune.unstructured_scores import Structure, below, cut, magnitude
from optimize.prune.unstructured_solver import prune_sparsegpt, prune_wanda

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from optimize.blockwise.lazy_weights import Stored
    from optimize.prune.unstructured import Config


@dataclass(frozen=True)
class Pruner:
    """Prunes layers by what their inputs are."""

    config: Config
    layers: Mapping[str, nn.Module]
    dtypes: Mapping[str, torch.dtype]
    """The type that each layer's weight is kept in."""
    sparse: frozenset[str] = frozenset()
    """Layers whose zeros are a mask already."""

    @cached_property
    def structures(self) -> dict[str, Structure]:
        return self.config.structures(self.layers)

    def __call__(self, names: Sequence[str], weights: Sequence[Tensor], moment: Moment) -> list[Changed]:
        """`Change` of `blockwise.sequence`: what is stored of a layer is its `weight`, as the checkpoint has it."""
        alike: dict[Structure, list[int]] = {}
        for index, name in enumerate(names):
            alike.setdefault(self.structures[name], []).append(index)
        changed: dict[int, Changed] = {}
        for structure, places in alike.items():
            some = [names[i] for i in places]
            changed |= dict(
                zip(places, self._alike(some, [weights[i] for i in places], moment, structure), strict=True)
            )
        return [changed[i] for i in range(len(names))]

    def _alike(
        self, names: Sequence[str], weights: Sequence[Tensor], moment: Moment, structure: Structure
    ) -> list[Changed]:
        config = self.config
        results: list[tuple[Tensor, dict[str, Any]]]
        if not moment.tokens:
            unknown = {"error": None, "magnitude_error": None, "ratio": None}
            results = [(weight.masked_fill(magnitude(weight, structure), 0), unknown) for weight in weights]
        else:
            found = (
                prune_wanda(weights, moment.matrix, structure)
                if config.importance == "wanda"
                else prune_sparsegpt(
                    weights,
                    moment.matrix,
                    structure,
                    damp_percent=config.damp_percent,
                    block_size=config.block_size,
                    refine=config.refine,
                    sparse=[name in self.sparse for name in names],
                )
            )
            dead = int((moment.matrix.diagonal() == 0).sum())
            results = []
            for one in found:
                facts = {
                    "error": rounded(one.error),
                    "magnitude_error": rounded(one.magnitude_error),
                    "ratio": rounded(one.error / one.magnitude_error) if one.magnitude_error else 1.0,
                    "dead_inputs": dead,
                    "dropped_tokens": moment.dropped,
                }
                if one.damp_percent > config.damp_percent:
                    facts["raised_damp_percent"] = rounded(one.damp_percent)
                results.append((one.weight, facts))
        return [self._changed(name, weight, facts) for name, (weight, facts) in zip(names, results, strict=True)]

    def _changed(self, name: str, weight: Tensor, facts: Mapping[str, Any]) -> Changed:
        kept = weight.to(self.dtypes[name])
        return Changed(
            weight=kept,
            tensors={f"{name}.weight": oriented(self.layers[name], kept).contiguous().cpu()},
            facts={"name": name, **described(kept), **facts},
        )


def described(weight: Tensor) -> dict[str, Any]:
    """What the table says of any pruned layer."""
    return {"weights": weight.numel(), "zeros": rounded(float((weight == 0).double().mean()))}


class ByMagnitude:
    """Prunes layers of a checkpoint one by one, as its tensors are written; `rows` are the table of layers so far."""

    def __init__(
        self,
        config: Config,
        layers: Mapping[str, nn.Module],
        tensors: Mapping[str, Stored],
        update: Callable[[float, float, str], None],
    ) -> None:
        self._layers, self._update, self._structures = layers, update, config.structures(layers)
        self._names = {tensors[f"{name}.weight"].key: name for name in layers}
        self._cut = None
        if config.global_pruning:
            self._cut = cut(lambda: (tensors[f"{name}.weight"].load() for name in layers), config.structure.sparsity)
        self._rows: dict[str, dict[str, Any]] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the model's order."""
        return [self._rows[name] for name in self._layers if name in self._rows]

    def __call__(self, key: str, tensor: Tensor) -> Tensor:
        """What is written in place of a tensor of the checkpoint."""
        if key not in self._names:
            return tensor
        name = self._names[key]
        weight = oriented(self._layers[name], tensor).float()
        mask = below(weight, *self._cut) if self._cut else magnitude(weight, self._structures[name])
        pruned = tensor.masked_fill(oriented(self._layers[name], mask), 0)
        self._rows[name] = {"name": name, **described(pruned)}
        self._update(len(self._rows), len(self._layers), name)
        return pruned
