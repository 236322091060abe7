"""Quantisation-aware training: fine-tune with rounded numbers, and ship the very model that was trained, in 8 bits, as
an ONNX graph for ONNX Runtime (Jacob et al., 2018, https://arxiv.org/abs/1712.05877).

    stages:
      - distill: finetune
        name: teacher
      - quantize: int8
        mode: qat
        backend: onnxruntime
        epochs: 1
        learning_rate: 2e-5

It takes a transformers artifact and needs no `export: onnx` before it. For where `mode: static` on an exported graph
loses too much: the graph comes out in the same form, with the same nodes rounded, and is as large and as fast.

The model is exported once as it came, which shows what will be rounded, and the ranges of activations are found on
calibration rows, as `mode: static` does. Then it trains on the labels with these numbers rounded (`fake_quant.py`); the
scales of activations are learnt with the weights. What is exported in the end computes on the codes that the model had
when training ended, and is held against it on real rows.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from optimize.artifact import Artifact
from optimize.calibration import Calibration, calibration_batches
from optimize.context import Context
from optimize.distill import training
from optimize.errors import StageError
from optimize.export import onnx as export
from optimize.export.parity import Check
from optimize.prune.masks import Held
from optimize.quantize import activation_ranges, graphs, qdq, trained
from optimize.quantize.rounding import activation_grid
from optimize.runtimes import onnx as runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import ModelProto

    from optimize.quantize.fake_quant import Grid
    from optimize.runtimes import Runner

VERSION = 2


class Config(training.Training):
    """`quantize: int8`, `mode: qat`, of a transformers artifact for ONNX Runtime."""

    mode: Literal["qat"]
    """`qat`: train with rounded numbers. The other modes of ONNX Runtime take an ONNX graph."""
    learning_rate: float = Field(2e-5, gt=0)
    """The highest learning rate, reached at the end of the warm-up; smaller than in fine-tuning from scratch."""
    per_channel: bool = True
    """A scale for each output channel of a weight instead of one for all."""
    reduce_range: bool = False
    """7-bit weights, for processors without VNNI, whose 8-bit sums can overflow."""
    calibration: Calibration = Calibration()
    """The rows on which activations' ranges are found before training."""
    calibrate: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    """How a range is chosen from what was seen: all of it, or a part that loses less by rounding than by cutting."""
    percentile: float = Field(99.99, gt=50, le=100)
    """With `calibrate: percentile`, the share of an activation's values, in per cent, that its range covers."""
    learn_scales: bool = True
    """Train the activations' scales with the weights; else they stay what calibration found."""
    ignore: tuple[str, ...] = ()
    """Globs of the graph's node names, or of their weights' names, that stay in float."""
    onnx: export.Config = export.Config()
    """How the graph is exported: what `export: onnx` takes."""
    tolerance: float = Field(0.3, gt=0)
    """The largest absolute difference of the graph's outputs from the trained model's on real rows. Codes and scales
    are the trained ones, but sums in another order move some activations by one code, which moved MiniLM's logits by up
    to 0.08; more than a few of those is an error."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Train and export. Raises `StageError` as `distill: finetune` and `export: onnx` do, where an `ignore` glob
    matches nothing or nothing can be rounded, and where the graph answers differently from what was trained.
    """
    from optimize.quantize.fake_quant import FakeQuantized

    task, spec = context.task, artifact.task
    with training.training(config, context), tempfile.TemporaryDirectory(dir=context.scratch) as scratch:
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
        check = Check(artifact, context, preprocessor)
        model = task.load_model(artifact.path, spec, trust_remote_code=artifact.trust_remote_code)
        model.config._name_or_path = ""
        Held(artifact, model)
        before = _exported(model, artifact, config, context, Path(scratch, "before"))
        graph = graphs.load(before.path / runtime.MODEL)
        ignored = graphs.matching(graph, qdq.OPERATORS, config.ignore)
        layers = _trainable(qdq.layers(graph, ignored), model)
        if not layers:
            raise StageError("nothing can be rounded: no linear layer or embedding is left", hint="look at `ignore`")
        fake = FakeQuantized(
            model,
            {_module(layer): next(iter(layer.rounded), None) for layer in layers},
            _grids(graph, layers, before, config, context),
            per_channel=config.per_channel,
            bits=_bits(config),
            learn=config.learn_scales,
        )
        model, details = training.train(model, preprocessor, spec, config, context)
        expected = trained.answers(model, check, context)
        ranges = {name: grid.range for name, grid in fake.grids.items()}
        fake.remove()
        after = _exported(model, artifact, config, context, Path(scratch, "after"))
        quantizer = qdq.Quantizer(
            graphs.load(after.path / runtime.MODEL),
            layers,
            ranges,
            per_channel=config.per_channel,
            sym=True,
            sym_activations=False,
            bits=_bits(config),
        )
        details |= {
            "mode": config.mode,
            "quantized": dict(Counter(layer.operator for layer in layers)),
            "ignored": ignored,
        }
        result = graphs.finished(quantizer.without([]), after, context, details)
    runner = cast("Runner", runtime.open(context.directory, threads=1))
    difference = trained.difference(runner, expected, config.tolerance, check, context)
    return replace(result, details={**result.details, "max_difference": difference})


def _exported(model: Any, artifact: Artifact, config: Config, context: Context, folder: Path) -> Artifact:
    """The model in float as an ONNX graph, by way of a checkpoint."""
    exported = folder / "onnx"
    exported.mkdir(parents=True)
    parent = trained.saved(model, artifact, folder / "model")
    return export.run(parent, config.onnx, replace(context, directory=exported))


def _trainable(layers: list[qdq.Layer], model: Any) -> list[qdq.Layer]:
    """Those that are a linear layer or an embedding of the model, whose name their node has."""
    from torch import nn

    modules = dict(model.named_modules())
    kinds = {"MatMul": nn.Linear, "Gemm": nn.Linear, "Gather": nn.Embedding}
    return [
        layer
        for layer in layers
        if layer.operator in kinds and isinstance(modules.get(_module(layer)), kinds[layer.operator])
    ]


def _module(layer: qdq.Layer) -> str:
    return layer.name.rpartition("/")[0]


def _bits(config: Config) -> int:
    return 7 if config.reduce_range else 8


def _grids(
    graph: ModelProto, layers: list[qdq.Layer], exported: Artifact, config: Config, context: Context
) -> Mapping[str, Grid]:
    """By the name of the activation, from what calibration rows show."""
    batches = calibration_batches(exported, config.calibration, context)
    names = list(dict.fromkeys(name for layer in layers for name in layer.rounded))
    total, done = activation_ranges.passes(config.calibrate) * len(batches), 0

    def tick() -> None:
        nonlocal done
        done += 1
        context.update(done, total, "calibrating")

    ranges = activation_ranges.ranges(
        activation_ranges.Activations(graph, names),
        batches,
        config.calibrate,
        percentile=config.percentile,
        sym=False,
        tick=tick,
    )
    return {name: activation_grid(*bounds, sym=False) for name, bounds in ranges.items()}
