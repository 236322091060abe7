"""4-bit weights whose 16 levels are not evenly spaced, by bitsandbytes (Dettmers et al., QLoRA, 2023,
https://arxiv.org/abs/2305.14314).

NF4 takes the quantiles of a normal distribution as its levels, FP4 a sign, two bits of exponent and one of mantissa.
Each block of `block_size` weights has a scale, its largest absolute value; double quantisation stores the scales
themselves in 8 bits: 4.127 bits a weight instead of 4.5. No calibration is needed.

    stages:
      - quantize: nf4
        double_quant: true
        ignore: ["model.layers.0.*"]

The result is a plain checkpoint: `AutoModelForCausalLM.from_pretrained(folder)` loads it wherever bitsandbytes is
installed. On a CPU with AVX512-BF16, bitsandbytes computes in bfloat16 whatever `compute_dtype` says, and takes only
layers whose outputs are a multiple of 32 and whose inputs are a multiple of `block_size`: others stay in float, so that
the file answers on every machine.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

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

_ROWS = 32
"""Of a tile of bitsandbytes' kernel for AVX512-BF16."""


class Config(Block):
    """`quantize: nf4`."""

    data_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels: quantiles of a normal distribution, or 4-bit floating point."""
    double_quant: bool = True
    """Store the blocks' scales in 8 bits, too."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share a scale."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What layers compute in, written into the checkpoint; `auto` is bfloat16 where the device has it, else float32."""
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
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.data_type,
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_compute_dtype": config.compute_dtype,
        },
        quantize=partial(_quantize, config=config),
        unfit=partial(_unfit, config=config),
    )


def apply_to(model: Any, config: Config) -> LayerTable:
    """Round the weights of a model of transformers in place, where it lies and in its own type; no rows are needed.

    Returns the table of layers: bits a weight, and the Frobenius norm of what changed over that of the weight. The
    weights stay in float: `run` is what stores them packed, and they stand for the same numbers.
    """
    return bnb_layers.apply_to(
        model,
        config.data_type.upper(),
        ignore=config.ignore,
        lm_head=config.lm_head,
        quantize=partial(_quantize, config=config),
        unfit=partial(_unfit, config=config),
    )


def _quantize(weight: torch.Tensor, config: Config) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    """`bnb_layers.Quantize`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight,
        blocksize=config.block_size,
        compress_statistics=config.double_quant,
        quant_type=config.data_type,
    )
    stored = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **stored}, dequantize_4bit(packed, state)


def _unfit(rows: int, columns: int, config: Config) -> str | None:
    if rows % _ROWS:
        return f"its {rows} outputs are no multiple of {_ROWS}"
    if columns % config.block_size:
        return f"its {columns} inputs are no multiple of block_size {config.block_size}"
    return None
