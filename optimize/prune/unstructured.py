"""Unstructured pruning: single weights become 0, wherever they are, or in the N:M pattern that some processors skip.

    stages:
      - prune: unstructured
        importance: sparsegpt
        sparsity: 0.5
        calibration: {num_samples: 128, max_length: 512}

`importance: magnitude` takes the smallest weights away (Han et al., 2015, https://arxiv.org/abs/1506.02626), and needs
no rows. `wanda` weighs them by what their inputs are on calibration rows (Sun et al., 2023,
https://arxiv.org/abs/2306.11695), and `sparsegpt` also moves those that stay, to make up for the loss (Frantar and
Alistarh, 2023, https://arxiv.org/abs/2301.00774). Those two go through the model block by block as `quantize: gptq`
does, each layer on what the pruned ones before it put out: one block's weights are in memory at a time, and a killed
run goes on behind the last finished block. `unstructured_scores.py` and `unstructured_solver.py` have the mathematics.

`layers` gives some layers another sparsity than the rest, such as those to which the answers are the least sensitive
(`optimize sensitivity` finds them):

      - prune: unstructured
        sparsity: 0.5
        layers: {"model.layers.0.*": {sparsity: 0.3}, "model.layers.1.mlp.up_proj": {sparsity: 0.6}}

The checkpoint is as large and as fast as before: zeros are stored and multiplied like any other number. It is a step
towards a runtime that skips them, and `scores.sparsity` and a warning say so. `sparsity.json` beside the weights names
the pruned layers; `quantize: gptq` and `distill: finetune` keep their zeros.

`details["layers"]` lists the share of each layer's weights that is 0 (`zeros`), and, where there was calibration, the
share of its output's energy that pruning changed (`error`), beside the same of pruning by magnitude
(`magnitude_error`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optimize.artifact import Artifact
from optimize.blockwise.abreast import memory_returned, threads
from optimize.blockwise.blocks import Blocks
from optimize.blockwise.finished import Finished
from optimize.blockwise.lazy_weights import checkpoint_tensors, stored, write_checkpoint
from optimize.blockwise.sequence import activation_bytes, change_layers, layer_rows, layers_inside, oriented, rounded
from optimize.calibration import Calibration, as_inputs, calibration_batches
from optimize.config import Block
from optimize.context import Context
from optimize.device import check_device
from optimize.errors import StageError
from optimize.notebook.layer_table import LayerTable
from optimize.planning import resolve_config
from optimize.prune import masks
from optimize.prune.unstructured_layers import ByMagnitude, Pruner, described
from optimize.prune.unstructured_scores import Structure, below, cut, magnitude
from optimize.quantize import checkpoint
from optimize.quiet import quiet

if TYPE_CHECKING:
    from torch import nn


VERSION = 1

HONEST = "zeros are stored and multiplied like any other number: by itself this is neither smaller nor faster"


class Layer(Block):
    """What is otherwise in some layers."""

    sparsity: float = Field(ge=0, lt=1)
    """Share of the weights that become 0; with 0 the layer stays dense."""


class Config(Block):
    """`prune: unstructured`."""

    importance: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    """What a weight is worth: its size; its size times the norm of its input; or the loss that the others can't make up
    for when it goes, and then they do."""
    sparsity: float | None = Field(None, gt=0, lt=1)
    """Share of each layer's weights that become 0: by default a half, and N/M with an N:M pattern."""
    mask_structure: str = Field("unstructured", pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$")
    """`unstructured`, or a pattern such as `2:4`: exactly N zeros in every M consecutive inputs."""
    global_pruning: bool = False
    """With `magnitude`: compare the weights of all layers with each other, so that some layers lose more."""
    targets: tuple[str, ...] = ("*",)
    """Globs of the names of linear layers inside the blocks that are pruned."""
    ignore: tuple[str, ...] = ()
    """Globs of names of layers that stay dense all the same."""
    layers: dict[str, Layer] = {}
    """Names of layers, or globs of them, that get another `sparsity`. A whole name goes before any glob; two globs may
    not say different things of one layer."""
    damp_percent: float = Field(0.01, gt=0, lt=1)
    """SparseGPT: share of the Hessian's mean diagonal that is added to it; raised where it can't be factorised
    otherwise."""
    block_size: int = Field(128, ge=1)
    """SparseGPT: columns for which the mask is chosen at a time, out of all rows together."""
    refine: int = Field(10, ge=0)
    """SparseGPT: steps that move the weights that stay on towards the least error under the mask; 0 leaves them as the
    paper's algorithm does."""
    true_sequential: bool = True
    """Within a block, too, show layers what the pruned ones before them put out."""
    calibration: Calibration = Calibration()
    """The rows that layers' inputs are taken from."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the forward passes multiply in; `auto` is bfloat16 where the device has it, else float32. Sums of blocks and
    Hessians are in float32 in any case."""
    activations_mb: int = Field(2048, ge=0)
    """Bound on the calibration's activations in memory; above it they go through the disk, and every layer costs a
    forward pass of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` is `cuda` where there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads, by default every usable core. Another number can give other bits."""

    @model_validator(mode="after")
    def _knobs_fit_together(self) -> Config:
        structure = self.structure
        if structure.zeros >= structure.of > 0:
            raise ValueError(f"mask_structure {self.mask_structure} leaves nothing: N:M has N zeros in every M, N < M")
        if structure.of and self.sparsity not in (None, structure.sparsity):
            raise ValueError(
                f"mask_structure {self.mask_structure} is a sparsity of {structure.sparsity:g}; leave one out"
            )
        if self.global_pruning and self.importance != "magnitude":
            raise ValueError(
                "global_pruning is for importance: magnitude; the others measure each layer by its own output"
            )
        if self.layers and (structure.of or self.global_pruning):
            told = "global_pruning" if self.global_pruning else f"mask_structure {self.mask_structure}"
            raise ValueError(f"{told} says how much every layer loses; leave it or `layers` out")
        if self.global_pruning and structure.of:
            raise ValueError("global_pruning has no say in an N:M pattern, which is the same everywhere")
        return self

    @property
    def structure(self) -> Structure:
        if self.mask_structure == "unstructured":
            return Structure(self.sparsity or 0.5)
        zeros, of = map(int, self.mask_structure.split(":"))
        return Structure(zeros / of, zeros, of)

    def structures(self, layers: Iterable[str]) -> dict[str, Structure]:
        """How much each layer loses. Raises `StageError` where `layers` contradicts itself or names nothing."""
        names = list(layers)
        own = checkpoint.settings_of(names, self.layers)
        return {name: Structure(own[name].sparsity) if name in own else self.structure for name in names}


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Prune. Raises `StageError` before the first layer for calibration rows that don't fit, widths that M does not
    divide, globs that match nothing and models that are quantised already or have no blocks; later where inputs are not
    finite.
    """
    import torch

    config = resolve_config(config)
    check_device(config.device)
    settings = checkpoint.float_config(artifact)
    with quiet(), threads(config.threads), memory_returned():
        model = checkpoint.empty_model(artifact, settings)
        tensors = checkpoint_tensors(artifact.path, model)
        files = sorted(artifact.path.glob("*.safetensors"))
        pieces = {key: piece for file in files for key, piece in stored(file).items()}
        if config.importance == "magnitude":
            layers, kept = _in_lists(model, config)
            by_magnitude = ByMagnitude(config, layers, tensors, context.update)
            write_checkpoint(context.directory, pieces, by_magnitude)
            rows = by_magnitude.rows
        else:
            blocks = Blocks(model, tensors, compute_dtype=getattr(torch, config.compute_dtype))
            layers, kept = layers_inside(model, blocks, config.targets, config.ignore)
            _check_widths(layers, config)
            batches = calibration_batches(artifact, config.calibration, context)
            device = torch.device(config.device)
            in_memory = activation_bytes(model, layers, batches) <= config.activations_mb * 10**6
            finished = Finished(context.scratch / "blocks", in_memory=in_memory, device=device)
            dtypes = {name: tensors[f"{name}.weight"].type for name in layers}
            pruner = Pruner(config, layers, dtypes, masks.pruned_layers(artifact))
            with blocks.opened(device):
                sequential = config.true_sequential
                change_layers(blocks, layers, batches, pruner, finished, context.update, sequential=sequential)
            made = {tensors[name].key: piece for name, piece in finished.tensors().items()}
            write_checkpoint(context.directory, {**pieces, **made})
            rows = layer_rows(finished)
    checkpoint.copy_others(artifact, context.directory)
    checkpoint.write_json(context.directory / checkpoint.CONFIG, settings)
    sparse = masks.pruned_layers(artifact).union(layers)
    masks.describe(context.directory, sparse, config.mask_structure)
    _warn(rows, context)
    return Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details={
            "importance": config.importance,
            "mask_structure": config.mask_structure,
            "zeros": _zeros(rows),
            "note": HONEST,
            "kept": kept,
            "summary": _summary(rows),
            "layers": rows,
        },
        trust_remote_code=artifact.trust_remote_code,
    )


def apply_to(model: Any, config: Config, batches: Iterable[Mapping[str, Any]] = ()) -> LayerTable:
    """Prune the weights of a model of transformers in place, where it lies and in its own type.

    `batches` are model inputs, int64 [batch, length] each, as arrays or tensors; magnitude needs none. Returns the
    table of layers.
    """
    batches = as_inputs(batches)
    if config.importance == "magnitude":
        layers, _ = _in_lists(model, config)
        weights = {name: oriented(layer) for name, layer in layers.items()}
        level = cut(weights.values, config.structure.sparsity) if config.global_pruning else None
        structures = config.structures(layers)
        for name, weight in weights.items():
            weight.masked_fill_(below(weight, *level) if level else magnitude(weight.float(), structures[name]), 0)
        rows = [{"name": name, **described(weight)} for name, weight in weights.items()]
        return LayerTable(rows, "pruned by magnitude")
    blocks = Blocks(model, None)
    layers, _ = layers_inside(model, blocks, config.targets, config.ignore)
    _check_widths(layers, config)
    pruner = Pruner(config, layers, {name: oriented(layer).dtype for name, layer in layers.items()})
    with TemporaryDirectory() as scratch, quiet(), threads(config.threads), blocks.opened(model.device):
        finished = Finished(Path(scratch), in_memory=True, device=model.device)
        sequential = config.true_sequential
        change_layers(blocks, layers, batches, pruner, finished, lambda *_: None, sequential=sequential)
        return LayerTable(layer_rows(finished), f"pruned by {config.importance}")


def layers_of(model: Any, config: Config) -> dict[str, nn.Module]:
    """The layers of a whole model that would be pruned, by name. Raises `StageError` as `run` does."""
    if config.importance == "magnitude":
        return _in_lists(model, config)[0]
    layers, _ = layers_inside(model, Blocks(model, None), config.targets, config.ignore)
    _check_widths(layers, config)
    return layers


def _in_lists(model: Any, config: Config) -> tuple[dict[str, nn.Module], list[str]]:
    """(the linear layers that the globs choose, by name; the others). Looked at are those in any list of modules: the
    blocks of a decoder or encoder, or of both.

    Raises `StageError` where a glob matches nothing, nothing is left, or a width does not fit the mask's structure.
    """
    from torch import nn

    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = {name: layer for name, layer in checkpoint.linear_layers(model).items() if name.startswith(lists)}
    layers, kept = checkpoint.choose(inside, config.targets, config.ignore)
    _check_widths(layers, config)
    return layers, kept


def _check_widths(layers: Mapping[str, nn.Module], config: Config) -> None:
    of = config.structure.of
    widths = {name: oriented(layer).shape[1] for name, layer in layers.items()}
    wrong = [f"{name} ({width})" for name, width in widths.items() if of and width % of]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise StageError(
            f"mask_structure {config.mask_structure} does not divide the inputs of {', '.join(wrong[:4])}{more}",
            hint="`ignore` these layers",
        )


def _zeros(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of all weights of these layers."""
    return rounded(sum(row["weights"] * row["zeros"] for row in rows) / sum(row["weights"] for row in rows))


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the layers' errors over those of pruning by magnitude."""
    ratios = {row["name"]: row["ratio"] for row in rows if row.get("ratio") is not None}
    if not ratios:
        return {"layers": len(rows)}
    worst = max(ratios, key=lambda name: ratios[name])
    return {
        "layers": len(rows),
        "mean_ratio": rounded(fmean(ratios.values())),
        "worst_ratio": ratios[worst],
        "worst": worst,
    }


def _warn(rows: Sequence[Mapping[str, Any]], context: Context) -> None:
    """What a person should know, each thing once."""
    context.warn(f"{_zeros(rows):.1%} of the weights of {len(rows)} layers are 0; {HONEST}")
    told: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
        ("saw no calibration tokens and were pruned by magnitude", lambda row: row.get("ratio", 0) is None),
        ("are no better than pruned by magnitude", lambda row: (row.get("ratio") or 0) > 1),
        ("had inputs that are no finite numbers, which were left out", lambda row: row.get("dropped_tokens", 0) > 0),
        ("needed a larger damp_percent", lambda row: "raised_damp_percent" in row),
    )
    for what, applies in told:
        names = [row["name"] for row in rows if applies(row)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            context.warn(f"{len(names)} of {len(rows)} layers {what}: {', '.join(names[:3])}{more}")
