"""Which zeros of a checkpoint are a mask, and what later stages do to keep it.

A pruned checkpoint is an ordinary one with zeros in it. That they were meant says `sparsity.json` beside the weights,
with the names of the pruned layers; the zeros themselves are the mask, so that the two can't disagree. The file goes
along wherever a checkpoint's other files are copied, and is part of the manifest like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.blockwise.lazy_weights import FLOATS, checkpoint_tensors
from optimize.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimize.artifact import Artifact

FILE = "sparsity.json"


def describe(directory: Path, layers: Iterable[str], mask_structure: str) -> None:
    """Write down that the zeros of these layers are a mask."""
    (directory / FILE).write_bytes(atomic.json_bytes({"layers": sorted(layers), "mask_structure": mask_structure}))


def pruned_layers(artifact: Artifact) -> frozenset[str]:
    """Names of the layers whose zeros are a mask. Raises `StageError` where the file makes no sense."""
    if FILE not in artifact.files:
        return frozenset()
    try:
        layers = json.loads((artifact.path / FILE).read_bytes())["layers"]
        return frozenset(str(name) for name in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{FILE} makes no sense: {error}", location=str(artifact.path)) from error


def sparsity(artifact: Artifact) -> float | None:
    """Share of the pruned layers' weights that is 0, counted in the files; None where there are no such layers, or
    their weights are packed in a way that does not say (NF4, LLM.int8()).
    """
    from optimize.quantize import checkpoint
    from optimize.quantize.gptq_format import load_layer, quantized_layers

    layers = pruned_layers(artifact)
    if not layers:
        return None
    packed = quantized_layers(artifact.path)
    settings = json.loads((artifact.path / checkpoint.CONFIG).read_bytes())
    tensors = checkpoint_tensors(artifact.path, checkpoint.empty_model(artifact, settings))
    weights = zeros = 0
    for name in [*tensors, *(f"{layer}.weight" for layer in packed)]:
        layer = name.removesuffix(".weight")
        if layer == name or not any(_same(layer, pruned) for pruned in layers):
            continue
        if layer in packed:
            values = load_layer(artifact.path, layer).dequantize()
        elif tensors[name].dtype in FLOATS:
            values = tensors[name].load()
        else:
            continue
        weights += values.numel()
        zeros += int((values == 0).sum())
    return zeros / weights if weights else None


class Held:
    """The masks of a model that is trained: its zeros get no gradient, and so no optimiser moves them.

    Does nothing for a model without masks.
    """

    def __init__(self, artifact: Artifact, model: nn.Module) -> None:
        self._artifact = artifact
        self._masks: dict[str, Tensor] = {}
        for name, parameter in _weights(model, pruned_layers(artifact)).items():
            self._masks[name] = mask = parameter.detach() == 0
            if parameter.requires_grad:
                parameter.register_hook(_without(mask))  # type: ignore[no-untyped-call]

    def finish(self, model: nn.Module, directory: Path) -> None:
        """Put back zeros that something else than a gradient moved (merged adapters, sharded training), and have what
        says of the masks go with the weights in `directory`.
        """
        import torch

        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in self._masks.items():
                weights[name].masked_fill_(mask.to(weights[name].device), 0)
        self._artifact.copy_files(directory, FILE.__eq__)


def _without(mask: Tensor) -> Any:
    """A gradient's hook: none of it where the mask is."""

    def hook(gradient: Tensor) -> Tensor:
        nonlocal mask
        mask = mask.to(gradient.device)
        return gradient.masked_fill(mask, 0)

    return hook


def _weights(model: nn.Module, layers: frozenset[str]) -> dict[str, nn.Parameter]:
    """Parameter of each layer, by its name in `model`, which may be the bare model of the one that was pruned, or have
    another head. Layers that are no more are left out.
    """
    found = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer != name and any(_same(layer, pruned) for pruned in layers):
            found[name] = parameter
    return found


def _same(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
