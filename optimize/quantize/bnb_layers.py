"""What the two methods of bitsandbytes share: which layers they take, and the checkpoint that transformers loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact
from optimize.blockwise.lazy_weights import checkpoint_tensors
from optimize.device import check_device
from optimize.errors import StageError
from optimize.notebook.layer_table import LayerTable
from optimize.quantize import checkpoint
from optimize.runtimes.quantized import load_library

if TYPE_CHECKING:
    import torch

    from optimize.context import Context

_HEAD, _TIED, _FP32 = "it gives the logits", "it shares its weight with another layer", "the architecture wants float32"
Quantize = Callable[["torch.Tensor"], tuple[Mapping[str, "torch.Tensor"], "torch.Tensor"]]
"""Weight [out, in] -> (what is stored, by the end of its name behind the layer's: `weight`, `SCB`; what it stands for,
float [out, in])."""
Unfit = Callable[[int, int], "str | None"]
"""(out, in) -> why such a layer can't be served, or None."""


def run(
    artifact: Artifact,
    context: Context,
    *,
    ignore: tuple[str, ...],
    lm_head: bool,
    device: str,
    quantization: Mapping[str, Any],
    quantize: Quantize,
    unfit: Unfit = lambda rows, columns: None,
    limit: float = math.inf,
) -> Artifact:
    """Quantise every linear layer but those in `ignore`, and describe the result.

    `quantization` is what `BitsAndBytesConfig` of transformers reads from `config.json`. Raises `StageError` where
    there is no such device, a glob of `ignore` matches nothing, nothing is left to quantise, or a weight is not finite
    or beyond `limit`.
    """

    check_device(device)
    load_library("bitsandbytes", extra="bitsandbytes")
    config = checkpoint.float_config(artifact)
    model = checkpoint.empty_model(artifact, config)
    chosen, kept = _choose(model, ignore, lm_head, unfit)
    names = _names(artifact, model)
    errors: dict[str, float] = {}
    weights = bits = 0

    def convert(name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        nonlocal weights, bits
        name = names.get(name, name)
        layer = name.removesuffix(".weight")
        if layer == name or layer not in chosen:
            return {name: tensor}
        matrix = tensor.T if chosen[layer] else tensor
        _check(name, matrix, limit)
        stored, meant = quantize(matrix.contiguous().to(device))
        errors[layer] = _relative_error(matrix, meant)
        weights += tensor.numel()
        bits += 8 * sum(value.nbytes for value in stored.values())
        return {f"{layer}.{end}": value for end, value in stored.items()}

    settings = {**config, "quantization_config": {**quantization, "llm_int8_skip_modules": sorted(kept)}}
    checkpoint.rewrite(artifact, settings, context, convert)
    if missing := sorted(set(chosen) - set(errors)):
        raise StageError(
            f"the checkpoint has no weight of {', '.join(missing[:3])}: its names are not those of the model's class",
            hint="load the model with transformers and save it again",
        )
    result = Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details={
            "quantized": len(errors),
            "bits_per_weight": round(bits / weights, 3),
            "kept": kept,
            "relative_error": {"mean": _rounded(sum(errors.values()) / len(errors)), "layers": errors},
        },
        trust_remote_code=artifact.trust_remote_code,
    )
    if result.size_bytes >= artifact.size_bytes:
        context.warn("the quantised checkpoint is no smaller than its parent")
    return result


def apply_to(
    model: Any,
    title: str,
    *,
    ignore: tuple[str, ...],
    lm_head: bool,
    quantize: Quantize,
    unfit: Unfit = lambda rows, columns: None,
    limit: float = math.inf,
) -> LayerTable:
    """Round the weights of a model of transformers in place; they stay in float, where they lie. Raises as `run`."""
    load_library("bitsandbytes", extra="bitsandbytes")
    chosen, _ = _choose(model, ignore, lm_head, unfit)
    rows = []
    for name, turned in chosen.items():
        weight = model.get_submodule(name).weight.detach()
        matrix = weight.T if turned else weight
        _check(name, matrix, limit)
        stored, meant = quantize(matrix.contiguous())
        bits = 8 * sum(value.nbytes for value in stored.values()) / weight.numel()
        rows.append({"name": name, "bits": round(bits, 3), "relative_error": _relative_error(matrix, meant)})
        matrix.copy_(meant)
    return LayerTable(rows, title)


def _check(name: str, weight: torch.Tensor, limit: float) -> None:
    if not weight.isfinite().all():
        raise StageError(f"{name} holds a number that is not finite", hint="look at the stage before")
    if (largest := weight.abs().max().item()) > limit:
        raise StageError(f"{name} holds {largest:.4g}, and bitsandbytes quantises from float16", hint="`ignore` it")


def _names(artifact: Artifact, model: Any) -> dict[str, str]:
    """Key in the files -> the model's name, where they differ (GPT-2's were saved without their first part)."""
    tensors = checkpoint_tensors(artifact.path, model)
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.key not in tensors:
            names.setdefault(tensor.key, name)  # the first of those that are tied
    return names


def _choose(model: Any, ignore: tuple[str, ...], lm_head: bool, unfit: Unfit) -> tuple[dict[str, bool], dict[str, str]]:
    """(layers to quantise -> whether their weight is stored [in, out], layers that stay in float -> why)."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    layers = checkpoint.linear_layers(model)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    head = next((name for name, module in layers.items() if module is model.get_output_embeddings()), None)
    if lm_head and f"{head}.weight" in tied:
        raise StageError("the head shares its weight with the embedding, which stays in float", hint="lm_head: false")
    kept: dict[str, str] = {}
    for name, module in layers.items():
        rows, columns = module.weight.shape[::-1] if type(module) is Conv1D else module.weight.shape
        if f"{name}.weight" in tied:
            kept[name] = _TIED
        elif name == head and not lm_head:
            kept[name] = _HEAD
        elif not should_convert_module(name, list(model._keep_in_fp32_modules or ())):
            kept[name] = _FP32
        elif why := unfit(rows, columns):
            kept[name] = why
    kept |= dict.fromkeys(checkpoint.matching(layers, ignore), "ignored")
    chosen = {name: type(module) is Conv1D for name, module in layers.items() if name not in kept}
    if not chosen:
        told = "; ".join(dict.fromkeys(kept.values())) or "the model has no linear layers"
        raise StageError(f"nothing was quantised: {told}", hint="look at `ignore`, and at the widths of the layers")
    # transformers reads the names as patterns: beginnings, ends, or regular expressions.
    if hit := [name for name in chosen if not should_convert_module(name, list(kept))]:
        raise StageError(
            f"transformers would leave {hit[0]} in float, too, since a layer that stays in float is named like it",
            hint="ignore both",
        )
    return chosen, kept


def _relative_error(weight: torch.Tensor, meant: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the weight."""
    exact = weight.double().cpu()
    return _rounded(((meant.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-30)).item())


def _rounded(error: float) -> float:
    """Three digits: the rest depends on the order of a sum."""
    return float(f"{error:.2e}")
