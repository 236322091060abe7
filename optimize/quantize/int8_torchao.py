"""8-bit weights and activations of linear layers, by torchao (https://github.com/pytorch/ao).

Weights have a scale for each output; activations are rounded to 8 bits as they come, with a scale for each token. No
calibration is needed.

    stages:
      - quantize: int8
        backend: torchao
        ignore: ["classifier"]
      - export: torch_export
        aot_inductor: true

The result is a plain checkpoint: `from_pretrained` loads it wherever torchao is installed. It is the fastest when it is
compiled, by `torch.compile` or by the export above. Where rounding costs too much, `mode: qat` trains with it
(`int8_qat_torchao.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize import shapes
from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize import checkpoint
from optimize.quiet import quiet
from optimize.runtimes.quantized import load_library, untouched_randomness
from optimize.runtimes.transformers import model_class

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1

EXTRA = "torchao"


class Rounding(Block):
    """How torchao rounds, and what."""

    sym: bool = True
    """Activations' codes lie evenly around 0; False shifts them to use the whole range of each token."""
    reduce_range: bool = False
    """7-bit weights and activations, for processors without VNNI, whose 8-bit sums can overflow."""
    ignore: tuple[str, ...] = ()
    """Globs of names of layers that stay in float."""


class Config(Rounding):
    """`quantize: int8` of a transformers artifact, `backend: torchao`."""

    mode: Literal["dynamic"] = "dynamic"
    """`dynamic`: weights ahead of time, activations as they come."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where a glob of `ignore` matches nothing or nothing is left to quantise."""
    load_library("torchao", extra=EXTRA)
    layers, kept = choose(checkpoint.empty_model(artifact, checkpoint.float_config(artifact)), config.ignore)
    result = rounded(artifact, config, layers, kept, context, {"mode": config.mode})
    if result.size_bytes >= artifact.size_bytes:
        context.warn("the quantised checkpoint is no smaller than its parent")
    return result


def rounded(
    artifact: Artifact,
    config: Rounding,
    layers: list[str],
    kept: Mapping[str, str],
    context: Context,
    details: Mapping[str, Any],
) -> Artifact:
    """The checkpoint with `layers` in 8 bits."""
    with quiet(), untouched_randomness():
        model = _quantized(artifact, config, list(kept))
        missing = [name for name in layers if not hasattr(model.get_submodule(name).weight, "qdata")]
        if missing:
            raise StageError(f"torchao left {', '.join(missing[:3])} in float", hint="`ignore` them")
        model.config._name_or_path = ""
        model.save_pretrained(context.directory)
    for file in context.directory.glob("*.safetensors"):
        _sort_header(file)
    checkpoint.copy_others(artifact, context.directory)
    return Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details={**details, "quantized": len(layers), "kept": dict(kept)},
        trust_remote_code=artifact.trust_remote_code,
    )


def choose(model: Any, ignore: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """(layers to quantise, layers that stay in float -> why). Raises `StageError` where a glob matches nothing or
    nothing is left.
    """
    from torch import nn
    from transformers.quantizers.quantizers_utils import should_convert_module

    layers = {name: module for name, module in checkpoint.linear_layers(model).items() if type(module) is nn.Linear}
    head = model.get_output_embeddings()
    kept = {name: "it gives the logits" for name, module in layers.items() if module is head}
    kept |= dict.fromkeys(checkpoint.matching(layers, ignore), "ignored")
    chosen = [name for name in layers if name not in kept]
    if not chosen:
        raise StageError("nothing was quantised: no linear layer is left", hint="look at `ignore`")
    # transformers reads the names as patterns: beginnings, ends, or regular expressions.
    if hit := [name for name in chosen if not should_convert_module(f"{name}.weight", list(kept))]:
        raise StageError(
            f"transformers would leave {hit[0]} in float, too, since a layer that stays in float is named like it",
            hint="ignore both",
        )
    return chosen, kept


def _quantized(artifact: Artifact, config: Rounding, kept: list[str]) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization.quant_primitives import MappingType
    from transformers import TorchAoConfig

    scheme = Int8DynamicActivationInt8WeightConfig(
        act_mapping_type=MappingType.SYMMETRIC if config.sym else MappingType.ASYMMETRIC,
        reduce_range=config.reduce_range,
        set_inductor_config=False,  # it would change the settings of the whole process
    )
    settings = checkpoint.float_config(artifact)
    name = str((settings.get("architectures") or ["none"])[0])
    cls, trusted = model_class(name, settings, artifact.trust_remote_code)
    try:
        return shapes.carried(cls, artifact.path).from_pretrained(
            artifact.path,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            quantization_config=TorchAoConfig(scheme, modules_to_not_convert=kept),
            device_map={"": "cpu"},
            **trusted,
        )
    except Exception as error:  # transformers, safetensors and torchao each raise their own
        raise StageError(f"torchao can't quantise it: {error}", location=str(artifact.path)) from error


def _sort_header(path: Path) -> None:
    """Put the metadata in order, which the library writes in another one every time."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
