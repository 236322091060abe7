"""What GPTQ makes of layers that share their inputs: codes, what is stored of them, and a row of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimize.blockwise.sequence import Changed, Moment, rounded
from optimize.quantize.gptq_format import pack
from optimize.quantize.gptq_solver import Grid, Quantized, Solution, round_to_nearest, solve_all

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.quantize.gptq import Config


def quantize_layers(
    names: Sequence[str],
    weights: Sequence[Tensor],
    moment: Moment,
    config: Config,
    grids: Mapping[str, Grid],
    sparse: frozenset[str],
) -> list[Changed]:
    """Codes for each layer, on its grid of `grids`. `weights` [out, in] are as the checkpoint has them; zeros of the
    `sparse` ones stay it.
    """
    alike: dict[Grid, list[int]] = {}
    for index, name in enumerate(names):
        alike.setdefault(grids[name], []).append(index)
    changed: dict[int, Changed] = {}
    for grid, places in alike.items():
        some = [names[i] for i in places]
        made = _on_a_grid(some, [weights[i] for i in places], moment, config, grid, sparse)
        changed |= dict(zip(places, made, strict=True))
    return [changed[i] for i in range(len(names))]


def _on_a_grid(
    names: Sequence[str],
    weights: Sequence[Tensor],
    moment: Moment,
    config: Config,
    grid: Grid,
    sparse: frozenset[str],
) -> list[Changed]:
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
            sparse=[name in sparse for name in names],
        )
        results = [(solution.quantized, _facts(solution, moment, config)) for solution in solutions]
    else:
        unknown = {"error": None, "rtn_error": None, "ratio": None}
        results = [(round_to_nearest(weight, grid), unknown) for weight in weights]
    return [
        Changed(
            weight=quantized.dequantize(),
            tensors={f"{name}.{key}": value for key, value in pack(quantized, grid.bits).items()},
            facts={"name": name, "bits": grid.bits, **facts},
        )
        for name, (quantized, facts) in zip(names, results, strict=True)
    ]


def _facts(solution: Solution, moment: Moment, config: Config) -> dict[str, Any]:
    """What the table says of a layer that calibration reached."""
    facts = {
        "error": rounded(solution.error),
        "rtn_error": rounded(solution.rtn_error),
        "ratio": rounded(solution.error / solution.rtn_error) if solution.rtn_error else 1.0,
        "rtn_rows": solution.rtn_rows,
        "dead_inputs": solution.dead,
        "dropped_tokens": moment.dropped,
    }
    if solution.damp_percent > config.damp_percent:
        facts["raised_damp_percent"] = rounded(solution.damp_percent)
    return facts
