"""PyTorch modules of a user's own: a factory in the environment makes the module, and a file holds its weights.

The folder has `model.safetensors` and a `config.json` that names the factory: `{"module": "package.module:factory",
"module_args": {...}}`. The module takes the task's inputs by position (pixels [batch, channels, height, width]) and
gives one tensor (logits [batch, labels]), or a mapping of names to tensors.

The factory is code: what a folder names is imported and called only where the recipe named it, which marks the artifact
as trusted, or where whoever opens the folder trusts it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import shapes
from optimize.errors import EvaluationError, SourceError
from optimize.runtimes.transformers import TorchRunner, parameters

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FRESH = "fresh"
"""In config.json: the weights are random, nobody has trained them."""
OUTPUT = "logits"
"""What a single tensor is called."""


class ModuleRunner(TorchRunner):
    """A loaded module."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        with self.answering():
            outputs = named(self.model(*map(torch.from_numpy, inputs.values())))
        return {name: value.float().numpy() for name, value in outputs.items()}


def named(outputs: Any) -> dict[str, torch.Tensor]:
    """A module's answer as tensors with names. Raises `TypeError` for what is neither a tensor nor a mapping."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return {OUTPUT: outputs}
    if isinstance(outputs, Mapping):
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    raise TypeError(f"the module gives a {type(outputs).__name__}, and not one tensor of {OUTPUT}")


def make(module: str, args: Mapping[str, Any]) -> torch.nn.Module:
    """What the factory gives, with weights that are random. Raises `SourceError` where it can't be had."""
    import torch

    where, _, factory = module.partition(":")
    try:
        made = getattr(import_module(where), factory)(**args)
    except Exception as error:  # a user's own code
        missing = isinstance(error, ImportError | AttributeError)
        raise SourceError(
            f"{module} makes no module: {type(error).__name__}: {error}",
            hint=f"see that Python finds {where} (install it, or PYTHONPATH)" if missing else "look at module_args",
        ) from error
    if not isinstance(made, torch.nn.Module):
        raise SourceError(f"{module} gives a {type(made).__name__}, and no torch.nn.Module")
    return made


def load(directory: Path, *, trusted: bool) -> torch.nn.Module:
    """The module with its weights, in evaluation mode. Raises `SourceError`, and imports nothing, where the folder is
    not trusted.
    """
    if not trusted:
        raise SourceError(
            "the model is made by code that its config.json names",
            location=str(directory),
            hint="name the module in a recipe (model.module), or export the model: an ONNX file needs no code",
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((directory / CONFIG).read_bytes())
        model = make(str(config["module"]), config.get("module_args") or {})
        weights = load_file(directory / WEIGHTS)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise SourceError(f"no module with its weights: {error!r}", location=str(directory)) from error
    if narrower := shapes.read(directory):
        shapes.resize(model, narrower)
    fill(model, weights, str(directory))
    return model.eval()


def fill(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Put weights into a module: all of its, and no others. Raises `SourceError`."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise SourceError(
            f"the weights are not those of the module: {told[:300]}",
            location=where,
            hint="look at module_args, and at what the weights were saved from",
        ) from error


def described(directory: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a trained module, from that of the folder it came from and its artifact's `task`."""
    config = json.loads((directory / CONFIG).read_bytes())
    config.pop(FRESH, None)
    return {**config, "task": spec["name"], "id2label": {str(i): name for i, name in enumerate(spec["labels"])}}


def save(model: torch.nn.Module, directory: Path, config: Mapping[str, Any]) -> None:
    """Write a folder that `load` reads; the same weights give the same bytes."""
    from safetensors.torch import save_file

    # Tensors may share memory, which the format does not know.
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS)
    write_config(directory, config)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(dict(config), indent=2, ensure_ascii=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> ModuleRunner:
    """Call the factory and load the weights. Raises `EvaluationError` where that is not trusted, or fails."""
    try:
        return ModuleRunner(load(directory, trusted=trust_remote_code), threads)
    except SourceError as error:
        raise EvaluationError(error.message, location=str(directory), hint=error.hint) from error


__all__ = ["described", "load", "make", "named", "open", "parameters", "save", "write_config"]
