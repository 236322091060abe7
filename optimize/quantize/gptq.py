"""GPTQ: weights in 2, 3, 4 or 8 bits, chosen so that each layer's output changes least on calibration text.

Frantar et al., 2022 (https://arxiv.org/abs/2210.17323): `gptq_solver.py` has the mathematics and `gptq_format.py` the
checkpoint, which loads in transformers, GPTQModel and vLLM.

    stages:
      - quantize: gptq
        bits: 4
        group_size: 64
        calibration: {num_samples: 128, max_length: 512}

The model's linear layers are quantised block by block, on what the quantised blocks before them put out. One block's
weights are in memory at a time, read from the checkpoint when its turn comes; a killed run goes on behind the last
finished block. What stands outside the blocks (embeddings, the head but for `lm_head: true`) stays in float. Zeros of a
pruned model stay zeros (`prune: unstructured`).

`layers` gives some layers other bits or another group size than the rest, such as those to which the answers are the
most sensitive (`optimize sensitivity` finds them):

      - quantize: gptq
        bits: 3
        layers: {"model.layers.0.*": {bits: 8}, "model.layers.1.mlp.down_proj": {bits: 4, group_size: 32}}

Such a checkpoint loads in GPTQModel, whose `dynamic` it is written in, in `optimize.load` and in every export of ours.
transformers by itself reads one width for all layers and refuses it.

`details["layers"]` lists for each layer the share of its output's energy that quantisation changed (`error`) and the
same of rounding to nearest (`rtn_error`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from optimize.artifact import Artifact
from optimize.blockwise.abreast import memory_returned, threads
from optimize.blockwise.blocks import Blocks
from optimize.blockwise.finished import Finished
from optimize.blockwise.lazy_weights import Stored, checkpoint_tensors, write_checkpoint
from optimize.blockwise.sequence import activation_bytes, change_layers, layer_rows, layers_inside, oriented, rounded
from optimize.calibration import Calibration, as_inputs, calibration_batches
from optimize.config import Block
from optimize.context import Context
from optimize.device import check_device
from optimize.errors import StageError
from optimize.notebook.layer_table import LayerTable
from optimize.planning import resolve_config
from optimize.prune.masks import pruned_layers
from optimize.quantize import checkpoint
from optimize.quantize.gptq_format import quantization_config
from optimize.quantize.gptq_layers import quantize_layers
from optimize.quantize.gptq_solver import Grid
from optimize.quiet import quiet

if TYPE_CHECKING:
    from torch import nn

    from optimize.tasks import Inputs

VERSION = 3

_UNIT = 32
"""Layers' widths must be multiples of it, so that codes fill whole words of the checkpoint."""


class Layer(Block):
    """What is otherwise in some layers."""

    bits: Literal[2, 3, 4, 8] | None = None
    """Of a weight's code; by default the stage's."""
    group_size: int | None = Field(None, ge=-1)
    """Inputs that share a scale; by default the stage's."""

    @model_validator(mode="after")
    def _says_something(self) -> Layer:
        if self.bits is None and self.group_size is None:
            raise ValueError("say `bits`, `group_size` or both")
        if self.group_size == 0:
            raise ValueError("group_size is -1 (all of a row) or at least 1")
        return self


class Config(Block):
    """`quantize: gptq`."""

    bits: Literal[2, 3, 4, 8] = 4
    """Of a weight's code."""
    group_size: int = Field(64, ge=-1)
    """Inputs that share a scale; -1 is all of a row. It must divide every layer's width: 64, the size of most models'
    attention heads, nearly always does, where the customary 128 often does not."""
    sym: bool = True
    """Codes lie evenly around 0, which is what fast kernels know best; False gives each group a zero point."""
    damp_percent: float = Field(0.01, gt=0, lt=1)
    """Share of the Hessian's mean diagonal that is added to it; raised where it can't be factorised otherwise."""
    desc_act: bool = True
    """Quantise columns with large inputs first (act-order)."""
    static_groups: bool = True
    """Choose scales before the columns are reordered: act-order then costs nothing when the model runs."""
    true_sequential: bool = True
    """Within a block, too, show layers what the quantised ones before them put out."""
    block_size: int = Field(128, ge=1)
    """Columns after which what rounding lost is spread over all that follow; changes time, not results."""
    scale_search: bool = True
    """Choose each group's scale for the least error instead of spanning its largest weight."""
    targets: tuple[str, ...] = ("*",)
    """Globs of the names of linear layers inside the blocks that are quantised."""
    ignore: tuple[str, ...] = ()
    """Globs of names of layers that stay in float all the same."""
    layers: dict[str, Layer] = {}
    """Names of layers, or globs of them, that get other `bits` or another `group_size`. A whole name goes before any
    glob; two globs may not say different things of one layer."""
    lm_head: bool = False
    """Quantise the output head, too. One that is tied to the embedding then ships beside it."""
    calibration: Calibration = Calibration()
    """The rows that layers' inputs are taken from."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the forward passes multiply in; `auto` is bfloat16 where the device has it, else float32. Sums of blocks and
    Hessians are in float32 in any case: SmolLM2's perplexity was 33.70 with `auto` and 33.71 with float32."""
    activations_mb: int = Field(2048, ge=0)
    """Bound on the calibration's activations in memory; above it they go through the disk, and every layer costs a
    forward pass of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` is `cuda` where there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads, by default every usable core. Another number can give other bits."""

    @field_validator("group_size")
    @classmethod
    def _groups_have_a_size(cls, value: int) -> int:
        if value == 0:
            raise ValueError("group_size is -1 (all of a row) or at least 1")
        return value


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise, block by block.

    Raises `StageError` before the first block for calibration rows that don't fit, widths that don't divide, globs
    that match nothing and models that are quantised already or have no blocks; later where inputs are not finite.
    """
    import torch

    config = resolve_config(config)
    check_device(config.device)
    settings = checkpoint.float_config(artifact)
    with quiet(), threads(config.threads), memory_returned():
        model = checkpoint.empty_model(artifact, settings)
        tensors = checkpoint_tensors(artifact.path, model)
        head = _head(model) if config.lm_head else None
        blocks = Blocks(model, tensors, head=head, compute_dtype=getattr(torch, config.compute_dtype))
        layers, kept = _chosen(model, blocks, config)
        grids = grids_of(layers, config)
        batches = calibration_batches(artifact, config.calibration, context)
        device = torch.device(config.device)
        in_memory = activation_bytes(model, layers, batches) <= config.activations_mb * 10**6
        finished = Finished(context.scratch / "blocks", in_memory=in_memory, device=device)
        sparse = pruned_layers(artifact)
        with blocks.opened(device):
            _quantize(blocks, layers, grids, batches, config, finished, context.update, sparse)
    rows = layer_rows(finished)
    _warn(rows, context)
    others = {name: grid for name, grid in grids.items() if grid != _grid(config)}
    _write(artifact, settings, config, context, tensors, finished.tensors(), kept, others, blocks.prefix)
    return Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details={
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": config.sym,
            "compute_dtype": config.compute_dtype,
            "kept": kept,
            **({"mean_bits": _mean_bits(layers, grids)} if others else {}),
            "summary": _summary(rows),
            "layers": rows,
        },
        trust_remote_code=artifact.trust_remote_code,
    )


def apply_to(model: Any, config: Config, batches: Iterable[Mapping[str, Any]]) -> LayerTable:
    """Round the weights of a model of transformers in place, where it lies and in its own type.

    `batches` are model inputs, int64 [batch, length] each, as arrays or tensors. Returns the table of layers. The
    weights stay in float: `run` is what stores them packed, and they stand for the same numbers.
    """
    batches = as_inputs(batches)
    blocks = Blocks(model, None, head=_head(model) if config.lm_head else None)
    layers, _ = _chosen(model, blocks, config)
    if config.lm_head:  # the embedding that it may be tied to stays as it is
        head = model.get_output_embeddings()
        head.weight = type(head.weight)(head.weight.detach().clone())
    with TemporaryDirectory() as scratch, quiet(), threads(config.threads), blocks.opened(model.device):
        finished = Finished(Path(scratch), in_memory=True, device=model.device)
        _quantize(blocks, layers, grids_of(layers, config), batches, config, finished, lambda *_: None)
        return LayerTable(layer_rows(finished), f"GPTQ, {config.bits} bits")


def grids_of(layers: Iterable[str], config: Config) -> dict[str, Grid]:
    """The grid of each layer. Raises `StageError` where `layers` in the config contradicts itself or names nothing."""
    names = list(layers)
    own = checkpoint.settings_of(names, config.layers)
    return {name: _grid(config, own.get(name)) for name in names}


def _grid(config: Config, own: Layer | None = None) -> Grid:
    bits, size = (own.bits, own.group_size) if own else (None, None)
    return Grid(bits or config.bits, config.group_size if size is None else size, config.sym)


def _mean_bits(layers: Mapping[str, nn.Module], grids: Mapping[str, Grid]) -> float:
    """Of a weight's code."""
    weights = {name: oriented(layer).numel() for name, layer in layers.items()}
    return rounded(sum(grids[name].bits * count for name, count in weights.items()) / sum(weights.values()))


def layers_of(model: Any, config: Config) -> dict[str, nn.Module]:
    """The layers of a whole model that would be quantised, by name. Raises `StageError` as `run` does."""
    return _chosen(model, Blocks(model, None, head=_head(model) if config.lm_head else None), config)[0]


def _quantize(
    blocks: Blocks,
    layers: Mapping[str, nn.Module],
    grids: Mapping[str, Grid],
    batches: Sequence[Inputs],
    config: Config,
    finished: Finished,
    update: Callable[[float, float, str], None],
    sparse: frozenset[str] = frozenset(),
) -> None:
    change = partial(quantize_layers, config=config, grids=grids, sparse=sparse)
    change_layers(blocks, layers, batches, change, finished, update, sequential=config.true_sequential)


def _chosen(model: Any, blocks: Blocks, config: Config) -> tuple[dict[str, nn.Module], list[str]]:
    """(the layers to be quantised by name, names of those inside the blocks that stay in float).

    Raises `StageError` where a glob matches nothing, or a layer's widths don't fit the grid or the checkpoint.
    """
    chosen, kept = layers_inside(model, blocks, config.targets, config.ignore)
    shapes = {name: tuple(oriented(layer).shape) for name, layer in chosen.items()}
    sizes = {name: grid.group_size for name, grid in grids_of(chosen, config).items()}
    for size in sorted(set(sizes.values()) - {-1}):
        here = {name: shape for name, shape in shapes.items() if sizes[name] == size}
        _refuse(f"group_size {size} does not divide the inputs of", here, lambda _, i, size=size: i % size != 0)  # type: ignore[misc]
    _refuse(f"no multiples of {_UNIT} are the widths of", shapes, lambda o, i: bool(o % _UNIT or i % _UNIT))
    return chosen, kept


def _refuse(problem: str, shapes: Mapping[str, tuple[int, ...]], applies: Callable[[int, int], bool]) -> None:
    wrong = [f"{name} ({i} inputs, {o} outputs)" for name, (o, i) in shapes.items() if applies(o, i)]
    if wrong:
        fitting = [str(n) for n in (32, 64, 96, 128, 192, 256) if all(i % n == 0 for _, i in shapes.values())]
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise StageError(
            f"{problem} {', '.join(wrong[:4])}{more}",
            hint=f"group_size can be {', '.join(['-1', *fitting])} here; or `ignore` these layers",
        )


def _head(model: Any) -> str:
    """Name of the output head. Raises `StageError` where it is no linear layer."""
    head = model.get_output_embeddings()
    for name, layer in checkpoint.linear_layers(model).items():
        if layer is head:
            return name
    raise StageError(f"{type(model).__name__} has no linear output head", hint="leave out lm_head")


def _write(
    artifact: Artifact,
    settings: dict[str, Any],
    config: Config,
    context: Context,
    tensors: Mapping[str, Stored],
    packed: Mapping[str, Stored],
    kept: list[str],
    others: Mapping[str, Grid],
    prefix: str,
) -> None:
    """The checkpoint: packed layers, all else as it was."""
    quantized = {name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")}
    pieces = dict(packed)
    shipped: set[Stored] = set()
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") in quantized or tensor in shipped:
            continue
        shipped.add(tensor)  # a tied tensor stands under several names
        # What other tools look for: the key it had, but for a bare model's, which lacks the first part.
        own = tensor.key.removesuffix(".weight") not in quantized and not name.endswith(f".{tensor.key}")
        pieces[tensor.key if own else name] = tensor
    write_checkpoint(context.directory, pieces)
    checkpoint.copy_others(artifact, context.directory)
    described = quantization_config(
        _grid(config),
        damp_percent=config.damp_percent,
        desc_act=config.desc_act,
        static_groups=config.static_groups,
        true_sequential=config.true_sequential,
        quantized=quantized,
        kept=kept,
        others=others,
    )
    # transformers (through optimum) knows the blocks of some decoders only, and a head by its full name at most.
    described["block_name_to_quantize"] = prefix
    if config.lm_head:
        described |= {
            "lm_head": True,
            "block_name_to_quantize": "",
            "modules_in_block_to_quantize": [sorted(quantized)],
        }
        settings["tie_word_embeddings"] = False
    checkpoint.write_json(context.directory / "quantize_config.json", described)
    checkpoint.write_json(context.directory / checkpoint.CONFIG, {**settings, "quantization_config": described})


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the layers' errors over those of rounding to nearest."""
    ratios = {row["name"]: row["ratio"] for row in rows if row["ratio"] is not None}
    if not ratios:
        return {"layers": len(rows)}
    worst = max(ratios, key=lambda name: ratios[name])
    mean = float(f"{fmean(ratios.values()):.4g}")
    return {"layers": len(rows), "mean_ratio": mean, "worst_ratio": ratios[worst], "worst": worst}


def _warn(rows: list[dict[str, Any]], context: Context) -> None:
    """What a person should know of the layers, each thing once."""
    for what, applies in (
        ("saw no calibration tokens and were rounded to nearest", lambda row: row["ratio"] is None),
        ("are no better than rounding to nearest", lambda row: row["ratio"] is not None and row["ratio"] >= 1),
        ("have inputs that were 0 on all calibration rows", lambda row: row.get("dead_inputs", 0) > 0),
        ("had inputs that are no finite numbers, which were left out", lambda row: row.get("dropped_tokens", 0) > 0),
        ("needed a larger damp_percent", lambda row: "raised_damp_percent" in row),
    ):
        names = [row["name"] for row in rows if applies(row)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            context.warn(f"{len(names)} of {len(rows)} layers {what}: {', '.join(names[:3])}{more}")
