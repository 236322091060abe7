"""A transformers checkpoint, rewritten tensor by tensor: one shard is in memory at a time, never the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optimize import shapes
from optimize.errors import StageError
from optimize.quiet import quiet

if TYPE_CHECKING:
    import torch

    from optimize.artifact import Artifact
    from optimize.context import Context

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
Setting = TypeVar("Setting")
Convert = Callable[[str, "torch.Tensor"], Mapping[str, "torch.Tensor"]]
"""(name, tensor) -> what takes its place in the file, by name."""


def float_config(artifact: Artifact) -> dict[str, Any]:
    """`config.json` of a checkpoint in float. Raises `StageError` where the weights are quantised already."""
    config: dict[str, Any] = json.loads((artifact.path / CONFIG).read_text(encoding="utf-8"))
    if quantization := config.get("quantization_config"):
        raise StageError(
            f"the weights are quantised already ({quantization.get('quant_method', 'by an unknown method')})",
            hint="say `from:` with the stage whose weights are still in float",
        )
    return config


def empty_model(artifact: Artifact, settings: Mapping[str, Any]) -> Any:
    """The artifact's model in float32, whatever its weights are in, with its parameters on the meta device; what it
    computes itself (as for rotary) is real.

    `settings` is its `config.json`. Raises `EvaluationError` where transformers has no such model.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from optimize.runtimes.transformers import model_class

    cls, trusted = model_class(
        str((settings.get("architectures") or ["none"])[0]), settings, artifact.trust_remote_code
    )
    with quiet(), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        configuration = AutoConfig.from_pretrained(artifact.path, local_files_only=True, **trusted)
        if hasattr(configuration, "quantization_config"):
            del configuration.quantization_config
        cls = shapes.carried(cls, artifact.path)
        build = cls.from_config if trusted else cls._from_config
        model = build(configuration, dtype=torch.float32, **trusted)
    model.tie_weights()  # building it lazily made two of each pair
    return model.eval()


def rewrite(artifact: Artifact, config: Mapping[str, Any], context: Context, convert: Convert) -> None:
    """Write the checkpoint anew into `context.directory`, with every tensor converted and this `config.json`.

    Files keep their names, and so does the split into shards. Raises `StageError` where a file can't be read.
    """
    shards = sorted(artifact.path.glob("*.safetensors"))
    total = sum(shard.stat().st_size for shard in shards)
    weight_map: dict[str, str] = {}
    size = done = 0
    for shard in shards:
        tensors = _converted(shard, convert)
        _save(tensors, context.directory / shard.name)
        weight_map.update(dict.fromkeys(tensors, shard.name))
        size += sum(tensor.nbytes for tensor in tensors.values())
        done += shard.stat().st_size
        context.update(done, total, shard.name)
    copy_others(artifact, context.directory)
    if INDEX in artifact.files:
        write_json(context.directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(context.directory / CONFIG, config)


def copy_others(artifact: Artifact, directory: Path) -> None:
    """Everything but the weights and `config.json`: the tokenizer, generation settings, ..."""

    def other(name: str) -> bool:
        return name not in (CONFIG, INDEX) and not ("/" not in name and name.endswith(".safetensors"))

    artifact.copy_files(directory, other)


def linear_layers(model: Any) -> dict[str, Any]:
    """Name -> module of every linear layer, of which GPT-2's `Conv1D` is one (its weight is [in, out])."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if type(module) in (Linear, Conv1D)}


def matching(layers: Iterable[str], globs: tuple[str, ...], knob: str = "ignore") -> list[str]:
    """The layers that a glob matches. Raises `StageError` where one matches none."""
    names = list(layers)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            hint = f"names look like {next(iter(names), '(none)')!r}"
            raise StageError(f"`{knob}` {glob!r} matches no linear layer", hint=hint)
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def choose(
    layers: Mapping[str, Any], targets: tuple[str, ...], ignore: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """(the layers that the globs choose, names of the others). Raises `StageError` where a glob matches nothing, or
    nothing is left.
    """
    chosen = set(matching(layers, targets, "targets")) - set(matching(layers, ignore))
    if not chosen:
        raise StageError("no linear layer is left", hint="look at `targets` and `ignore`")
    return {name: layer for name, layer in layers.items() if name in chosen}, sorted(layers.keys() - chosen)


def settings_of(layers: Iterable[str], settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """What a stage's `layers` says of those layers that it names, by name or glob.

    The order in which it says so means nothing: a whole name goes before any glob, and of two globs that match the same
    layer both have to say the same. Raises `StageError` where they don't, or where one matches nothing.
    """
    names = list(layers)
    found: dict[str, Setting] = {}
    by: dict[str, str] = {}
    for glob in sorted(settings):
        for name in matching(names, (glob,), "layers"):
            if name in settings and glob != name:
                continue
            if found.setdefault(name, settings[glob]) != settings[glob]:
                raise StageError(
                    f"`layers` says two things of {name}: by {by[name]!r} and by {glob!r}",
                    hint="give that layer a line of its own, with its whole name",
                )
            by[name] = glob
    return found


def _converted(shard: Path, convert: Convert) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                tensors.update(convert(name, file.get_tensor(name)))
    except (SafetensorError, OSError) as error:
        raise StageError(f"the weights can't be read: {error}", location=str(shard)) from error
    return tensors


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As people would like to read it, and the same bytes every time."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
