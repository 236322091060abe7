"""GPTQ block by block: layers in the order in which a block runs them, each on what those before it gave, quantised."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.quantize.blocks import Blocks, shared_inputs
from optimize.quantize.forwards import Forwards
from optimize.quantize.gptq_format import pack
from optimize.quantize.gptq_solver import Grid, Hessian, Quantized, Solution, round_to_nearest, solve_all

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from optimize.quantize.finished import Finished
    from optimize.quantize.gptq import Config
    from optimize.tasks import Inputs


@dataclass(frozen=True)
class _Moment:
    """What calibration showed a layer: the second moment of its inputs [in, in], over so many tokens."""

    matrix: Tensor
    tokens: int
    dropped: int
    """Tokens left out, since they were no finite numbers."""


def quantize_blocks(
    blocks: Blocks,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Inputs],
    config: Config,
    finished: Finished,
    update: Callable[[float, float, str], None],
) -> None:
    """Quantise `layers` (by name), and tell `update` after every block. Goes on behind what is finished already.

    Raises `StageError` where no input of a layer is finite, or the model does not run through its blocks in order.
    """
    if not finished.count:
        with blocks.embedding():
            finished.add((blocks.embed(inputs) for inputs in batches), {}, {"layers": [], "gives_tuple": None})
    blocks.gives_tuple = finished.facts()[-1]["gives_tuple"]
    paused = finished.in_memory and config.true_sequential
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
            for names, moment in _moments(inside, groups, batches, forwards, blocks.compute_dtype, config):
                weights = [oriented(inside[name], blocks.original(f"{name}.weight")) for name in names]
                quantized_layers = _quantize(names, weights, moment, config)
                del moment, weights  # large, and the next passes come before their successors
                for name, quantized, row in quantized_layers:
                    oriented(inside[name]).copy_(quantized.dequantize())
                    tensors |= {f"{name}.{key}": value for key, value in pack(quantized, config.bits).items()}
                    rows.append(row)
            outputs = forwards.finish() if index + 1 < total else ()
            finished.add(outputs, tensors, {"layers": rows, "gives_tuple": blocks.gives_tuple})
        done = index + 1
        left = (time.perf_counter() - began) / (done - first) * (total - done)
        update(done, total, f"block {done} of {total}, about {left:.0f} s left")


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
    config: Config,
) -> Iterator[tuple[Sequence[str], _Moment]]:
    """(layers, their inputs' moment) in the order in which they run; the next is due when these are rounded.

    Inputs count as the layers multiply them, in `dtype`.
    """
    import torch

    for step in [[group] for group in groups] if config.true_sequential else [groups]:
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
            yield names, _moment(hessians.pop(0))
    unseen = layers.keys() - {name for names in groups for name in names}
    yield sorted(unseen), _Moment(torch.empty(0), tokens=0, dropped=0)


def _moment(hessian: Hessian) -> _Moment:
    return _Moment(hessian.matrix, hessian.tokens, hessian.dropped)


def _quantize(
    names: Sequence[str], weights: Sequence[Tensor], moment: _Moment, config: Config
) -> list[tuple[str, Quantized, dict[str, Any]]]:
    """(name, codes, row of the table) of each layer. `weights` [out, in] are as the checkpoint has them."""
    grid = Grid(config.bits, config.group_size, config.sym)
    if moment.dropped and not moment.tokens:
        raise StageError(
            f"no input of {names[0]} is a finite number, on any of {moment.dropped} tokens",
            hint="set compute_dtype: float32; if that does not help, the model itself overflows on these rows",
        )
    results: list[tuple[Quantized, dict[str, Any]]]
    if moment.tokens:
        solutions = solve_all(
            weights,
            moment.matrix,
            grid,
            damp_percent=config.damp_percent,
            desc_act=config.desc_act,
            static_groups=config.static_groups,
            block_size=config.block_size,
            scale_search=config.scale_search,
        )
        results = [(solution.quantized, _facts(solution, moment, config)) for solution in solutions]
    else:
        unknown = {"error": None, "rtn_error": None, "ratio": None}
        results = [(round_to_nearest(weight, grid), unknown) for weight in weights]
    return [
        (name, quantized, {"name": name, "bits": config.bits, **facts})
        for name, (quantized, facts) in zip(names, results, strict=True)
    ]


def _facts(solution: Solution, moment: _Moment, config: Config) -> dict[str, Any]:
    """What the table says of a layer that calibration reached."""
    facts = {
        "error": _rounded(solution.error),
        "rtn_error": _rounded(solution.rtn_error),
        "ratio": _rounded(solution.error / solution.rtn_error) if solution.rtn_error else 1.0,
        "rtn_rows": solution.rtn_rows,
        "dead_inputs": solution.dead,
        "dropped_tokens": moment.dropped,
    }
    if solution.damp_percent > config.damp_percent:
        facts["raised_damp_percent"] = _rounded(solution.damp_percent)
    return facts


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
