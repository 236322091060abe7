"""GPTQ by the library GPTQModel: the second opinion on `quantize: gptq`, with a solver of its own.

    stages:
      - quantize: gptq
        backend: gptqmodel
        bits: 4
        group_size: 64

The method is that of Frantar et al. (2022, https://arxiv.org/abs/2210.17323); rows, knobs and the checkpoint are those
of our own solver (`optimize/quantize/gptq.py`), defaults those of the library (https://github.com/ModelCloud/GPTQModel).
The same version gives the same bytes again with the same number of threads.
"""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from typing import Literal

from pydantic import Field

from optimize import shapes
from optimize.artifact import Artifact
from optimize.calibration import Calibration, calibration_batches
from optimize.config import Block
from optimize.context import Context
from optimize.device import check_device
from optimize.errors import StageError
from optimize.planning import resolve_config
from optimize.prune.masks import pruned_layers
from optimize.quantize import checkpoint
from optimize.quantize.gptq_format import quantization_config, quantized_layers
from optimize.quantize.gptq_solver import Grid
from optimize.quiet import quiet
from optimize.runtimes.quantized import load_library, untouched_randomness

VERSION = 1


class Config(Block):
    """`quantize: gptq` with `backend: gptqmodel`."""

    bits: Literal[2, 3, 4, 8] = 4
    """Of a weight."""
    group_size: int = Field(64, ge=-1)
    """Neighbouring inputs that share a scale; -1 is all of them (per channel)."""
    sym: bool = True
    """Codes lie evenly around 0; False shifts them to use the whole range."""
    damp_percent: float = Field(0.05, gt=0, lt=1)
    """What is added to the Hessian's diagonal, as a share of its mean."""
    desc_act: bool = False
    """Quantise inputs in the order of their activations; `g_idx` is out of order then, and slower to serve."""
    static_groups: bool = False
    """Fix every group's scale beforehand."""
    act_group_aware: bool = True
    """Order inputs by activation where that keeps groups whole (not with `desc_act`)."""
    true_sequential: bool = True
    """Quantise the layers of a block one after the other, each on the outputs of those before."""
    ignore: tuple[str, ...] = ()
    """Globs of names of layers that stay in float."""
    calibration: Calibration = Calibration()
    """The rows that it looks at."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to quantise; `auto` is `cuda` where there is one."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where the library can't do it, which says why in its own words."""
    import torch

    config = resolve_config(config)
    check_device(config.device)
    settings = checkpoint.float_config(artifact)
    if pruned_layers(artifact):
        context.warn("gptqmodel knows no masks: zeros of the pruned model don't stay zeros; leave `backend` out")
    if shapes.FILE in artifact.files:
        raise StageError("gptqmodel loads no model whose config.json lacks its widths", hint="leave `backend` out")
    rows = [
        {"input_ids": ids[None], "attention_mask": mask[None]}
        for batch in calibration_batches(artifact, config.calibration, context)
        for ids, mask in zip(
            torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"]), strict=True
        )
    ]
    kept = checkpoint.matching(checkpoint.linear_layers(checkpoint.empty_model(artifact, settings)), config.ignore)
    library = load_library("gptqmodel", extra="gptq")
    # Left to itself it writes below the current folder.
    import_module("gptqmodel.looper.loop_processor")._PROJECT_LOG_DIR = context.logs  # type: ignore[attr-defined]
    saved = context.scratch / "saved"
    with quiet(), untouched_randomness():
        try:
            model = library.GPTQModel.load(
                str(artifact.path),
                library.QuantizeConfig(
                    bits=config.bits,
                    group_size=config.group_size,
                    sym=config.sym,
                    damp_percent=config.damp_percent,
                    desc_act=config.desc_act,
                    static_groups=config.static_groups,
                    act_group_aware=config.act_group_aware and not config.desc_act,
                    true_sequential=config.true_sequential,
                    dynamic={f"-:^{re.escape(name)}$": {} for name in kept} or None,
                    offload_to_disk_path=str(context.scratch / "offload"),
                    pack_impl="original",  # the others compile an extension first
                ),
                device=config.device,
                dtype=getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype") or "float32")),
            )
            context.update(0, 1, "quantising")
            log = model.quantize(rows, batch_size=config.calibration.batch_size, calibration_data_min_length=1)
            model.save(str(saved))
        except Exception as error:  # it raises whatever it stumbles over
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise StageError(f"gptqmodel can't quantise this model: {reason}", hint="leave `backend` out") from error
    # Its own copies of the other files hold paths and times.
    for path in saved.glob("*.safetensors*"):
        shutil.move(path, context.directory / path.name)
    checkpoint.copy_others(artifact, context.directory)
    layers = quantized_layers(context.directory)
    quantization = quantization_config(
        Grid(config.bits, config.group_size, config.sym),
        damp_percent=config.damp_percent,
        desc_act=config.desc_act,
        static_groups=config.static_groups,
        true_sequential=config.true_sequential,
        quantized=layers,
        kept=kept,
        tool="gptqmodel",
    )
    checkpoint.write_json(context.directory / "quantize_config.json", quantization)
    checkpoint.write_json(context.directory / checkpoint.CONFIG, {**settings, "quantization_config": quantization})
    return Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details={
            "quantized": len(layers),
            "ignored": kept,
            "loss": {f"{row['layer']}.{row['module']}": float(f"{float(row['loss']):.2e}") for row in log["gptq"]},
        },
        trust_remote_code=artifact.trust_remote_code,
    )
