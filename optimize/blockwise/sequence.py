"""Layer after layer, block after block: each on what those before it gave, changed already."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.blockwise.blocks import Blocks, shared_inputs
from optimize.blockwise.forwards import Forwards
from optimize.blockwise.hessian import Hessian
from optimize.errors import StageError
from optimize.quantize import checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from optimize.blockwise.finished import Finished
    from optimize.tasks import Inputs


@dataclass(frozen=True)
class Moment:
    """What calibration showed a layer: the second moment of its inputs [in, in], over so many tokens."""

    matrix: Tensor
    tokens: int
    dropped: int
    """Tokens left out, since they were no finite numbers."""


@dataclass(frozen=True)
class Changed:
    """What became of a layer."""

    weight: Tensor
    """[out, in]: what the passes go on with."""
    tensors: Mapping[str, Tensor]
    """What is stored of it, by name."""
    facts: dict[str, Any]
    """Its row of the table of layers."""


Change = Callable[[Sequence[str], Sequence["Tensor"], Moment], Sequence[Changed]]
"""Names of layers with the same inputs, their weights float32 [out, in] as the checkpoint has them, and the moment of
those inputs (of no tokens where calibration did not reach them) -> what becomes of each."""


def change_layers(
    blocks: Blocks,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Inputs],
    change: Change,
    finished: Finished,
    update: Callable[[float, float, str], None],
    *,
    sequential: bool,
) -> None:
    """Change `layers` (by name), and tell `update` after every block. Goes on behind what is finished already.

    sequential: within a block, too, layers see what the changed ones before them put out.

    Raises `StageError` where no input of a layer is finite, or the model does not run through its blocks in order.
    """
    if not finished.count:
        with blocks.embedding():
            finished.add((blocks.embed(inputs) for inputs in batches), {}, {"layers": [], "gives_tuple": None})
    blocks.gives_tuple = finished.facts()[-1]["gives_tuple"]
    paused = finished.in_memory and sequential
    first, total, began = finished.count - 1, len(blocks.names), time.perf_counter()
    for index in range(first, total):

        def run(batch: int, rows: int | None = None, index: int = index) -> Tensor:
            inputs = {name: array[:rows] for name, array in batches[batch].items()}
            return blocks.run(index, inputs, finished.hidden(batch)[:rows])

        inside = {name: layer for name, layer in layers.items() if blocks.holds(index, name)}
        with blocks.filled(index), contextlib.closing(Forwards(run, len(batches), paused=paused)) as forwards:
            groups = shared_inputs(inside, lambda run=run: run(0, rows=1))  # type: ignore[misc]
            tensors: dict[str, Tensor] = {}
            rows: list[dict[str, Any]] = []
            for names, moment in _moments(inside, groups, batches, forwards, blocks.compute_dtype, sequential):
                weights = [oriented(inside[name], blocks.original(f"{name}.weight")) for name in names]
                changes = change(names, weights, moment)
                del moment, weights  # large, and the next passes come before their successors
                for name, changed in zip(names, changes, strict=True):
                    oriented(inside[name]).copy_(changed.weight)
                    tensors |= changed.tensors
                    rows.append(changed.facts)
                del changes
            outputs = forwards.finish() if index + 1 < total else ()
            finished.add(outputs, tensors, {"layers": rows, "gives_tuple": blocks.gives_tuple})
        done = index + 1
        left = (time.perf_counter() - began) / (done - first) * (total - done)
        update(done, total, f"block {done} of {total}, about {left:.0f} s left")


def layers_inside(
    model: Any, blocks: Blocks, targets: tuple[str, ...], ignore: tuple[str, ...]
) -> tuple[dict[str, nn.Module], list[str]]:
    """(the linear layers inside the blocks that the globs choose, by name, in the model's order; names of the others
    there). Raises `StageError` where a glob matches nothing, or nothing is left.
    """
    inside = {
        name: layer
        for name, layer in checkpoint.linear_layers(model).items()
        if any(blocks.holds(index, name) for index in range(len(blocks.names)))
    }
    return checkpoint.choose(inside, targets, ignore)


def activation_bytes(model: Any, layers: Mapping[str, nn.Module], batches: Sequence[Inputs]) -> int:
    """Of all batches waiting at the widest layer: the block's input, its output, its residual and the layer's input."""
    embedding = model.get_input_embeddings().weight
    widest = max(oriented(layer).shape[1] for layer in layers.values())
    tokens = sum(batch["input_ids"].size for batch in batches)
    return int(tokens * (3 * embedding.shape[1] + widest) * embedding.element_size())


def layer_rows(finished: Finished) -> list[dict[str, Any]]:
    """The table of layers: what `change_layers` was told of each, in the order in which they run."""
    return [row for step in finished.facts() for row in step["layers"]]


def rounded(value: float) -> float:
    """Four digits: the rest depends on the order of a sum."""
    return float(f"{value:.4g}")


def oriented(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a linear layer as [outputs, inputs]; GPT-2's `Conv1D` has it the other way round."""
    from torch import nn

    weight = layer.get_parameter("weight").detach() if weight is None else weight
    return weight if isinstance(layer, nn.Linear) else weight.T


def _moments(
    layers: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    batches: Sequence[Inputs],
    forwards: Forwards,
    dtype: torch.dtype | None,
    sequential: bool,
) -> Iterator[tuple[Sequence[str], Moment]]:
    """(layers, their inputs' moment) in the order in which they run; the next is due when these are changed.

    Inputs count as the layers multiply them, in `dtype`.
    """
    import torch

    for step in [[group] for group in groups] if sequential else [groups]:
        first = [layers[names[0]] for names in step]
        hessians = [Hessian(oriented(layer).shape[1], oriented(layer).device) for layer in first]

        def look(batch: int, layer: int, x: Tensor, hessians: list[Hessian] = hessians) -> None:
            tokens = x.reshape(-1, x.shape[-1])
            mask = batches[batch].get("attention_mask")
            if mask is not None and mask.size == len(tokens) and not mask.all():  # padding does not count
                tokens = tokens[torch.from_numpy(mask.reshape(-1) != 0).to(tokens.device)]
            hessians[layer].add(tokens if dtype is None else tokens.to(dtype))

        forwards.reach(first, look)
        for names in step:
            yield names, _moment(names, hessians.pop(0))
    unseen = layers.keys() - {name for names in groups for name in names}
    yield sorted(unseen), Moment(torch.empty(0), tokens=0, dropped=0)


def _moment(names: Sequence[str], hessian: Hessian) -> Moment:
    if hessian.dropped and not hessian.tokens:
        raise StageError(
            f"no input of {names[0]} is a finite number, on any of {hessian.dropped} tokens",
            hint="set compute_dtype: float32; if that does not help, the model itself overflows on these rows",
        )
    return Moment(hessian.matrix, hessian.tokens, hessian.dropped)
