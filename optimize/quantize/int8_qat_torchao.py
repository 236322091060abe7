"""Quantisation-aware training: fine-tune with rounded numbers, and ship the very model that was trained, in 8 bits, as
a checkpoint of torchao (https://github.com/pytorch/ao; Jacob et al., 2018, https://arxiv.org/abs/1712.05877).

    stages:
      - distill: finetune
        name: teacher
      - quantize: int8
        mode: qat
        backend: torchao
        epochs: 1
        learning_rate: 2e-5
      - export: torch_export
        aot_inductor: true

The result is a checkpoint as `mode: dynamic` gives it, and as fast. What is rounded there is rounded in training, by
the same code: weights with a scale for each output, activations as they come, with a scale for each token. No
calibration is needed, and no scale is learnt: each follows from the numbers that it is for.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from optimize.distill import training
from optimize.export.parity import Check
from optimize.prune.masks import Held
from optimize.quantize import checkpoint, int8_torchao, trained
from optimize.runtimes import transformers as runtime
from optimize.runtimes.quantized import load_library, untouched_randomness

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.context import Context

VERSION = 1


class Config(training.Training, int8_torchao.Rounding):
    """`quantize: int8`, `mode: qat`, of a transformers artifact, `backend: torchao`."""

    mode: Literal["qat"]
    """`qat`: train with rounded numbers."""
    learning_rate: float = Field(2e-5, gt=0)
    """The highest learning rate, reached at the end of the warm-up; smaller than in fine-tuning from scratch."""
    tolerance: float = Field(0.3, gt=0)
    """The largest absolute difference of the checkpoint's outputs from the trained model's on real rows. Codes are the
    trained ones, but sums in another order move some activations by one code; more than a few of those is an error."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Train and round. Raises `StageError` as `distill: finetune` does, where a glob of `ignore` matches nothing or
    nothing can be rounded, and where the checkpoint answers differently from what was trained.
    """
    with untouched_randomness():
        load_library("torchao", extra=int8_torchao.EXTRA)
    from optimize.quantize import fake_quant_torchao

    checkpoint.float_config(artifact)
    task, spec = context.task, artifact.task
    with training.training(config, context), tempfile.TemporaryDirectory(dir=context.scratch) as scratch:
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
        check = Check(artifact, context, preprocessor)
        model = task.load_model(artifact.path, spec, trust_remote_code=artifact.trust_remote_code)
        model.config._name_or_path = ""
        Held(artifact, model)
        layers, kept = int8_torchao.choose(model, config.ignore)
        fake_quant_torchao.prepare(model, layers, sym=config.sym, reduce_range=config.reduce_range)
        model, details = training.train(model, preprocessor, spec, config, context)
        expected = trained.answers(model, check, context)
        fake_quant_torchao.restore(model, layers)
        parent = trained.saved(model, artifact, Path(scratch, "model"))
        result = int8_torchao.rounded(parent, config, layers, kept, context, {**details, "mode": config.mode})
    runner = runtime.open(context.directory, threads=1, trust_remote_code=artifact.trust_remote_code)
    difference = trained.difference(runner, expected, config.tolerance, check, context)
    return replace(result, details={**result.details, "max_difference": difference})
