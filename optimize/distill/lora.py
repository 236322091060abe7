"""Low-rank adapters (LoRA: Hu et al., 2022, https://arxiv.org/abs/2106.09685) by peft, merged into the weights.

Only two thin matrices beside each layer are trained, so that the optimiser and the checkpoints hold a few per cent of
what full training would: recovery for models that are too large for it.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from pydantic import Field

from optimize.config import Block
from optimize.errors import StageError


class Lora(Block):
    """Adapters that are trained in place of the weights."""

    r: int = Field(8, ge=1)
    """Their rank: how many columns each pair of matrices has."""
    alpha: int = Field(16, ge=1)
    """What an adapter adds is scaled by `alpha / r`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are left out at each step."""
    targets: tuple[str, ...] = Field(("*",), min_length=1)
    """Globs of the names of the linear layers that get one; the default is all but the head."""


def adapted(model: Any, lora: Lora | None) -> Any:
    """The model with adapters, all else of it frozen but a head that chooses labels; as it is where `lora` is None.

    Raises `StageError` where a glob matches no linear layer, and for a model that is none of transformers.
    """
    if lora is None:
        return model
    import peft

    if not hasattr(model, "get_output_embeddings"):
        raise StageError("adapters are for models of transformers", hint="leave lora out")
    heads = _heads(model)
    layers = [name for name in _linear(model) if name.partition(".")[0] not in heads]
    for glob in lora.targets:
        if not fnmatch.filter(layers, glob):
            raise StageError(
                f"no linear layer is named {glob!r}", hint=f"such as {layers[0]}" if layers else "leave lora out"
            )
    chosen = [name for name in layers if any(fnmatch.fnmatchcase(name, glob) for glob in lora.targets)]
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=chosen,
        modules_to_save=heads or None,
    )
    return peft.get_peft_model(model, settings)


def _heads(model: Any) -> list[str]:
    """What chooses labels may be new, and has to be trained whole; what foretells tokens is not."""
    if model.get_output_embeddings() is not None:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _linear(model: Any) -> list[str]:
    """Names of linear layers, but for the one that foretells tokens."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]
