"""The same weights in 16 bits: half the file, and half the bytes that every token has to read.

    stages:
      - quantize: cast
        dtype: bfloat16

bfloat16 keeps float32's range and 8 bits of precision (Kalamkar et al., 2019, https://arxiv.org/abs/1905.12322);
float16 keeps 11 bits, and ends at 65504 (Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740). Every
floating-point tensor is rounded to the nearest, norms and stored buffers too; what the model computes afresh when it is
loaded (rotary frequencies) stays as the library makes it. The runtime then computes in the type of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.evaluate.host import computes_in
from optimize.quantize import checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

VERSION = 1


class Config(Block):
    """`quantize: cast`."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """The type that weights are stored and computed in."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Cast. Raises `StageError` where a weight lies outside the type's range or nothing is in another type."""
    import torch

    dtype = getattr(torch, config.dtype)
    counts = {"cast": 0, "kept": 0}

    def convert(name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            counts["kept"] += 1
            return {name: tensor}
        counts["cast"] += 1
        return {name: _cast(name, tensor, dtype)}

    settings = checkpoint.float_config(artifact)
    settings.pop("torch_dtype", None)  # what older libraries called it
    checkpoint.rewrite(artifact, {**settings, "dtype": config.dtype}, context, convert)
    if not counts["cast"]:
        raise StageError(f"every weight is in {config.dtype} already", hint="leave the stage out")
    if not computes_in(config.dtype):
        context.warn(f"this processor has no arithmetic in {config.dtype}: the file shrinks, and answers come slower")
    return Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details={"dtype": config.dtype, "tensors": counts},
        trust_remote_code=artifact.trust_remote_code,
    )


def apply_to(model: nn.Module, config: Config) -> dict[str, int]:
    """Cast every stored tensor of a module in place, where it lies; no rows are needed.

    Returns {"cast", "kept"}: how many tensors were of another type, and of this or of whole numbers. Raises
    `StageError` where a weight lies outside the type's range; nothing has changed then.
    """
    import torch

    dtype = getattr(torch, config.dtype)
    stored = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}  # tied ones once
    wanted = [(n, t) for n, t in stored.values() if t.is_floating_point() and t.dtype != dtype]
    for name, tensor in wanted:
        _cast(name, tensor.detach(), dtype)
    for name, tensor in wanted:
        tensor.data = _cast(name, tensor.detach(), dtype)
    return {"cast": len(wanted), "kept": len(stored) - len(wanted)}


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    result = tensor.to(dtype)
    lost = result.isinf() & tensor.isfinite()
    if lost.any():
        kind = str(dtype).removeprefix("torch.")
        raise StageError(
            f"{name} holds {tensor[lost].abs().max().item():.4g}, and {kind} ends at {torch.finfo(dtype).max:.4g}",
            hint="set dtype: bfloat16, which has the range of float32",
        )
    return result
