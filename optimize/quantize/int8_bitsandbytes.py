"""8-bit weights and activations, but for the few columns where activations are large, by bitsandbytes: LLM.int8()
(Dettmers et al., 2022, https://arxiv.org/abs/2208.07339).

Weights are stored in 8 bits with a scale for each output; activations are rounded to 8 bits with a scale for each
token, except in columns that hold a value beyond `threshold`, which are multiplied in float. No calibration is needed.

    stages:
      - quantize: int8
        backend: bitsandbytes
        threshold: 6.0
        ignore: ["model.layers.0.*"]

The result is a plain checkpoint that `from_pretrained` loads wherever bitsandbytes is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.planning import resolve_config
from optimize.quantize import bnb_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from optimize.notebook.layer_table import LayerTable

VERSION = 1

_LARGEST_HALF = 65504.0
"""Of float16, from which the library quantises."""


class Config(Block):
    """`quantize: int8` of a transformers artifact."""

    threshold: float = Field(6.0, ge=0)
    """Columns with an activation beyond this are multiplied in float; 0 rounds all of them."""
    lm_head: bool = False
    """Quantise the layer that gives the logits as well, where its weight is its own."""
    ignore: tuple[str, ...] = ()
    """Globs of names of layers that stay in float."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to quantise; `auto` is `cuda` where there is one."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise; see `bnb_layers.run` for what is raised."""
    config = resolve_config(config)

    return bnb_layers.run(
        artifact,
        context,
        ignore=config.ignore,
        lm_head=config.lm_head,
        device=config.device,
        quantization={
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": config.threshold,
        },
        quantize=_quantize,
        limit=_LARGEST_HALF,
    )


def apply_to(model: Any, config: Config) -> LayerTable:
    """Round the weights of a model of transformers in place, where it lies and in its own type; no rows are needed.

    Returns the table of layers: bits a weight, and the Frobenius norm of what changed over that of the weight. The
    weights stay in float and activations are left alone, so that `threshold` says nothing here.
    """
    return bnb_layers.apply_to(
        model,
        "LLM.int8()",
        ignore=config.ignore,
        lm_head=config.lm_head,
        quantize=_quantize,
        limit=_LARGEST_HALF,
    )


def _quantize(weight: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    """`bnb_layers.Quantize`."""
    import torch
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(weight.half())  # its kernels take nothing else
    stored = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, int8_vectorwise_dequant(codes, scales)
