"""The dimensions of a model that can be pruned, by the dependency graph of torch-pruning (DepGraph: Fang et al., 2023,
https://arxiv.org/abs/2301.12900).

The library traces a forward pass and says which channels of which tensors have to go together. What they are, we tell
by where the layer stands that reads them: in an attention module, elsewhere in a block, or in several blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimize.blockwise.blocks import find_blocks
from optimize.errors import StageError
from optimize.prune.forward import answers
from optimize.prune.units import Dimension, Kind, Slice

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEAD_SIZE = ("head_dim", "attention_head_size", "head_size", "attention_head_dim")
"""What attention modules call the channels of a head."""


def find(model: Any, inputs: Mapping[str, Tensor]) -> list[Dimension]:
    """In the order of the model's modules. `inputs` is any batch that the model takes.

    The model is left in evaluation mode, with gradients for its parameters. Raises `StageError` where it can't be
    traced.
    """
    import torch
    import torch_pruning

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(model, dict(inputs), forward_fn=_traced, verbose=False)
            if hasattr(model, "config"):
                _keep_halves_together(graph)
            return list(_Reader(model, graph).dimensions())
    except (RuntimeError, ValueError, AttributeError, AssertionError, KeyError, IndexError, TypeError) as error:
        raise StageError(
            f"torch-pruning can't follow {type(model).__name__}: {type(error).__name__}: {error}",
            hint="structured pruning knows encoders and decoders of Linear layers, and convolutional networks",
        ) from error


def _traced(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    import torch

    values = answers(model, inputs).values()
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


def _keep_halves_together(graph: Any) -> None:
    """In transformers the two halves of a head are concatenated (rotary embedding), and never features.

    The library takes that for the latter where queries have twice the width of keys, and never comes to an end.
    """
    for node in graph.module2node.values():
        if node.type == graph.ops.OPTYPE.CONCAT:
            node.enable_index_mapping = False
            into = [dep for source in node.inputs for dep in source.dependencies if dep.target is node]
            for dep in (*node.dependencies, *into):
                dep.index_mapping = [None, None]


class _Reader:
    """Turns torch-pruning's groups into ours."""

    def __init__(self, model: Any, graph: Any) -> None:
        self.model, self.graph = model, graph
        self.names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self.blocks = f"{find_blocks(model)}." if hasattr(model, "config") else None
        embedding = model.get_input_embeddings() if hasattr(model, "config") else None
        self.embedding = getattr(embedding, "weight", None)

    def dimensions(self) -> Iterator[Dimension]:
        seen: set[tuple[str, str]] = set()
        hidden: Dimension | None = None
        tied: list[Dimension] = []
        for name, module in self.names_of_layers():
            side = "out" if _is_convolution(module) else "in"
            if (name, side) in seen or (side == "out" and module.groups not in (1, module.out_channels)):
                continue
            items = self.group(module, side, range(_width(module, side)))
            seen |= {(part.name, part.side) for part in items}
            made = any(part.side == "out" for part in items)
            read = [part for part in items if part.side == "in"]
            if not made or not read or any(self.is_grouped(part) for part in items):
                continue  # what comes from outside, and what is the answer
            kind = self.kind(read[0].name if side == "in" else name, items)
            if kind == "heads":
                yield self.heads(name, module)
            elif kind == "hidden":
                hidden = Dimension(name, kind, len(items[0].channels), tuple(items))
            elif kind is not None:
                yield Dimension(name, kind, len(items[0].channels), tuple(items))
            elif any(self.model.get_submodule(part.name).weight is self.embedding for part in read):
                tied.append(Dimension(name, "hidden", len(items[0].channels), tuple(items)))
        if hidden is not None:
            # The layer that gives the logits may be the embedding itself, and read something else than the blocks.
            yield Dimension(
                hidden.name, "hidden", hidden.units, hidden.slices + tuple(part for one in tied for part in one.slices)
            )

    def names_of_layers(self) -> Iterator[tuple[str, Any]]:
        """Convolutions, then linear layers: what the first make the others may read in a flattened form."""
        from torch import nn

        traced = [(name, module) for module, name in self.names.items() if module in self.graph.module2node]
        yield from ((name, module) for name, module in traced if _is_convolution(module))
        yield from ((name, module) for name, module in traced if isinstance(module, nn.Linear))

    def group(self, module: nn.Module, side: str, channels: range) -> list[Slice]:
        """What has to go with channels of one side of a layer, each channel a unit."""
        pruner = self.graph.get_pruner_of_module(module)
        root = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        found = []
        for item in self.graph.get_pruning_group(module, root, list(channels)).items:
            if (part := self.slice(item.dep, item.idxs, item.root_idxs, channels)) is not None:
                found.append(part)
        return found

    def slice(self, dep: Any, indices: list[int], roots: list[int | None], channels: range) -> Slice | None:
        """One of a group's items; None for an operation without weights."""
        from torch import nn

        target = dep.target.module
        units: dict[int | None, list[int]] = {}
        for index, root in zip(indices, roots, strict=True):
            units.setdefault(root, []).append(index)
        # Keys that queries share have lost what they belong to; whoever asks for a head at a time knows it.
        lists = [units.get(channel, []) for channel in channels] if None not in units else [sorted(indices)]
        of_units = tuple(map(tuple, lists))
        if isinstance(target, nn.Parameter):
            return Slice(self.graph._param_to_name[target], "parameter", of_units, None, dep.target.pruning_dim)
        if target not in self.names:
            return None
        reads = isinstance(target, nn.Linear) or (_is_convolution(target) and target.groups == 1)
        inner = reads and self.graph.is_in_channel_pruning_fn(dep.handler)
        return Slice(self.names[target], "in" if inner else "out", of_units, dep.handler)

    def is_grouped(self, part: Slice) -> bool:
        if part.side == "parameter":
            return False
        module = self.model.get_submodule(part.name)
        return getattr(module, "groups", 1) not in (1, getattr(module, "out_channels", 1))

    def kind(self, name: str, items: list[Slice]) -> Kind | None:
        """None for what stands beside the blocks, such as a pooler."""
        if self.blocks is None:
            return "channels" if _is_convolution(self.model.get_submodule(name)) else "ffn"
        around = {self.block_of(part.name) for part in items}
        if len(around) > 1:
            return "hidden"
        block = around.pop()
        if block is None:
            return None
        return "heads" if self.attention(name, block) is not None else "ffn"

    def block_of(self, name: str) -> str | None:
        """Its number."""
        assert self.blocks is not None
        return name.removeprefix(self.blocks).partition(".")[0] if name.startswith(self.blocks) else None

    def attention(self, name: str, block: str) -> str | None:
        """The outermost module of attention that a layer of a block lies in."""
        inner = name.removeprefix(f"{self.blocks}{block}.").split(".")
        for depth in range(1, len(inner)):
            outer = f"{self.blocks}{block}.{'.'.join(inner[:depth])}"
            if "attention" in type(self.model.get_submodule(outer)).__name__.lower():
                return outer
        return None

    def heads(self, name: str, module: Any) -> Dimension:
        """Heads, each with the keys and values that it reads; those that share them are one unit."""
        size = self.head_size(name, module)
        whole = self.group(module, "in", range(module.in_features))
        narrowest = min(
            len({channel for unit in part.channels for channel in unit}) for part in whole if part.side == "out"
        )
        units, rest = divmod(narrowest, size)
        if rest or module.in_features % narrowest:
            raise ValueError(f"{name} reads {module.in_features} channels, and a head has {size}")
        width = module.in_features // units
        cut = [self.group(module, "in", range(unit * width, (unit + 1) * width)) for unit in range(units)]
        slices = []
        for parts in zip(*cut, strict=True):
            channels = tuple(tuple(sorted({c for unit in part.channels for c in unit})) for part in parts)
            if len({len(own) for own in channels}) > 1 or len({part.name for part in parts}) > 1:
                raise ValueError(f"the heads that {name} reads are not alike")
            slices.append(Slice(parts[0].name, parts[0].side, channels, parts[0].cut, parts[0].dim))
        return Dimension(name, "heads", units, tuple(slices))

    def head_size(self, name: str, module: Any) -> int:
        block = self.block_of(name)
        outer = self.attention(name, block) if block else None
        if outer is not None:
            for inner in self.model.get_submodule(outer).modules():
                for key in _HEAD_SIZE:
                    if isinstance(size := getattr(inner, key, None), int):
                        return size
        config = self.model.config.get_text_config()
        return int(module.in_features // config.num_attention_heads)


def _is_convolution(module: Any) -> bool:
    from torch.nn.modules.conv import _ConvNd

    return isinstance(module, _ConvNd)


def _width(module: Any, side: str) -> int:
    if side == "out":
        return int(module.out_channels)
    return int(module.in_features)
