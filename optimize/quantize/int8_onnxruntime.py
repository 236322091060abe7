"""8-bit weights and activations, by ONNX Runtime.

`mode: dynamic` needs no calibration: weights are quantised ahead of time, activations to 8 bits as they come, with the
range of the very batch (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html; the arithmetic
is that of Jacob et al., 2018, https://arxiv.org/abs/1712.05877). Embeddings are stored in 8 bits, too: they are half of
a small encoder's file.

    stages:
      - export: onnx
      - quantize: int8
        mode: dynamic
        ignore: ["classifier/*"]

`mode: static` finds activations' ranges on calibration rows (`activation_ranges.py`), after SmoothQuant where that is
wanted (`smooth_quant.py`), and writes them into the file (`qdq.py`). `max_drop` keeps the layers in float that the
answers are the most sensitive to (`budget.py`).

      - quantize: int8
        mode: static
        smooth_quant: 0.8
        sym: false
        max_drop: 0.005
        calibration: {num_samples: 256}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.calibration import Calibration, calibration_batches
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize import activation_ranges, budget, fusion, graphs, qdq
from optimize.quantize.smooth_quant import LINEAR, smooth
from optimize.quiet import quiet
from optimize.runtimes import onnx
from optimize.runtimes.onnx_seq2seq import DECODER

if TYPE_CHECKING:
    from onnx import ModelProto

    from optimize.runtimes import Runner
    from optimize.tasks import Inputs

VERSION = 2

OPERATORS = ("MatMul", "Gemm", "Attention", "Gather", "EmbedLayerNormalization")
"""What `dynamic` quantises where its weight is a constant."""
RESULTS = ("MatMulInteger", "QAttention", "DequantizeLinear", "QEmbedLayerNormalization")
"""What becomes of them (`DequantizeLinear` follows a quantised embedding)."""
_STATIC = ("calibration", "calibrate", "percentile", "sym_activations", "format", "smooth_quant")


class Config(Block):
    """`quantize: int8`."""

    mode: Literal["dynamic", "static"] = "dynamic"
    """`dynamic`: weights ahead of time, activations as they come. `static`: activations on ranges of calibration rows,
    which saves looking for them at every call."""
    per_channel: bool = True
    """A scale for each output channel of a weight instead of one for all."""
    sym: bool = True
    """Weights' codes lie evenly around 0; False shifts them to use the whole range."""
    reduce_range: bool = False
    """7-bit weights, for processors without VNNI, whose 8-bit sums can overflow."""
    ignore: tuple[str, ...] = ()
    """Globs of node names, or of their weights' names, that stay in float."""
    max_drop: float | None = Field(None, ge=0)
    """Keep layers in float, the most sensitive first, until the task's first metric drops by no more than this on the
    labelled calibration rows (0.005: half a point)."""
    calibration: Calibration = Calibration()
    """`static`: the rows that ranges are found on."""
    calibrate: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    """`static`: an activation's range: all values seen, or what clipping leaves by one of three measures (see
    `activation_ranges.py`). On MiniLM behind SmoothQuant, `minmax` and `mse` are the closest to float, `percentile` is
    a quarter further; without it all three are about as far as `dynamic`, and `entropy` ten times as far."""
    percentile: float = Field(99.99, gt=50, le=100)
    """`calibrate: percentile`: the share of an activation's values, in per cent, that its range covers."""
    sym_activations: bool = False
    """`static`: ranges of activations lie evenly around 0, too."""
    smooth_quant: float | None = Field(None, ge=0, le=1)
    """`static`: shift outliers from activations to weights by this much; 0.5 shares them out evenly, 1 leaves them to
    the weights. MiniLM's sentence embeddings are 0.0094 from float's without (mean cosine distance; `dynamic`: 0.0084),
    0.0174 with 0.5, 0.0046 with 0.65, 0.0032 with 0.8 and 0.9, and 0.0020 with 0.8 and `sym: false`. It takes 3 % of
    the time, since there most divisions can't be folded into a layer before."""
    format: Literal["qdq", "qoperator"] = "qdq"
    """`static`: `qdq` writes standard operators between pairs of QuantizeLinear and DequantizeLinear, which ONNX
    Runtime fuses when it loads the file, and other runtimes read. `qoperator` writes what ONNX Runtime makes of them,
    with biases added inside: for ONNX Runtime alone, where MiniLM takes 0.93 of `qdq`'s time (which is `dynamic`'s)."""

    @model_validator(mode="after")
    def _said_for_a_reason(self) -> Config:
        """What was only spelled out, as in a recipe's normal form, says nothing."""
        said = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.mode == "dynamic" and (idle := [name for name in said if name in _STATIC]):
            raise ValueError(f"{', '.join(idle)}: only mode: static looks at that")
        if self.calibrate != "percentile" and "percentile" in said:
            raise ValueError(f"percentile: calibrate: {self.calibrate} does not look at that")
        return self


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where an `ignore` glob matches nothing, nothing could be quantised, or no choice of
    layers meets `max_drop`.
    """
    if not config.reduce_range and _lacks_vnni():
        context.warn("this processor has no VNNI, so that 8-bit sums can overflow: try reduce_range: true")
    if (artifact.path / DECODER).exists():
        from optimize.quantize import int8_seq2seq

        return int8_seq2seq.run(artifact, config, context)
    make = _dynamic if config.mode == "dynamic" else _static
    return make(artifact, config, context)


def _dynamic(artifact: Artifact, config: Config, context: Context) -> Artifact:
    source = artifact.path / onnx.MODEL
    model = graphs.load(source)
    ignored = graphs.matching(model, OPERATORS, config.ignore)
    details: dict[str, Any] = {"mode": config.mode, "ignored": ignored}
    kept: Collection[str] = ()
    if config.max_drop is not None:
        layers = [layer for layer in graphs.weighted(model, OPERATORS) if layer not in ignored]
        if not layers:
            raise _nothing(OPERATORS)
        kept = _spend(
            layers,
            lambda kept: quantize_dynamic(model, [*ignored, *kept], config, context.scratch),
            artifact,
            config,
            context,
            details,
        )
    quantized = quantize_dynamic(model, [*ignored, *kept], config, context.scratch)
    counts = Counter(node.op_type for node in quantized.graph.node)
    done = {name: counts[name] for name in RESULTS if counts[name]}
    if not done:
        raise _nothing(OPERATORS)
    return graphs.finished(quantized, artifact, context, {**details, "quantized": done})


def _static(artifact: Artifact, config: Config, context: Context) -> Artifact:
    model = graphs.load(artifact.path / onnx.MODEL)
    ignored = graphs.matching(model, qdq.OPERATORS, config.ignore)
    layers = qdq.layers(model, ignored)
    if not layers:
        raise _nothing(qdq.OPERATORS)
    details: dict[str, Any] = {"mode": config.mode, "ignored": ignored}
    batches = calibration_batches(artifact, config.calibration, context)
    steps = len(batches) * ((config.smooth_quant is not None) + activation_ranges.passes(config.calibrate))
    done = iter(range(1, steps + 1))

    def tick() -> None:
        context.update(next(done), steps, "calibrating")

    if config.smooth_quant is not None:
        edges = {layer.input: None for layer in layers if layer.operator in LINEAR}
        maxima = activation_ranges.column_maxima(activation_ranges.Activations(model, [*edges]), batches, tick)
        details["smooth_quant"] = smooth(model, layers, maxima, config.smooth_quant)
        layers = qdq.layers(model, ignored)
    edges = {edge: None for layer in layers for edge in layer.rounded}
    ranges = activation_ranges.ranges(
        activation_ranges.Activations(model, [*edges]),
        batches,
        config.calibrate,
        percentile=config.percentile,
        sym=config.sym_activations,
        tick=tick,
    )
    quantizer = qdq.Quantizer(
        model,
        layers,
        ranges,
        per_channel=config.per_channel,
        sym=config.sym,
        sym_activations=config.sym_activations,
        bits=7 if config.reduce_range else 8,
    )
    kept: Collection[str] = ()
    if config.max_drop is not None:
        kept = _spend([layer.name for layer in layers], quantizer.without, artifact, config, context, details)
    quantized = quantizer.without(kept)
    details["quantized"] = dict(Counter(layer.operator for layer in layers if layer.name not in kept))
    fused = fusion.fused(quantized, context.scratch)
    _advise(model, quantized, fused, layers, batches[0], context)
    if config.format == "qoperator":
        quantized = fused
        fusion.with_biases(quantized)
    return graphs.finished(quantized, artifact, context, details)


def _spend(
    layers: list[str],
    quantized_without: Callable[[Collection[str]], ModelProto],
    artifact: Artifact,
    config: Config,
    context: Context,
    details: dict[str, Any],
) -> tuple[str, ...]:
    """The layers that `max_drop` keeps in float, noted in `details`."""
    assert config.max_drop is not None
    folder = context.scratch / "trial"
    folder.mkdir(exist_ok=True)

    def opened(kept: Collection[str]) -> Runner:
        (folder / onnx.MODEL).write_bytes(quantized_without(kept).SerializeToString())
        return runtimes.get("onnx").open(folder, threads=1)

    spent = budget.spend(config.max_drop, layers, opened, artifact, context)
    details |= {"kept": list(spent.kept), "sensitivity": spent.details}
    return spent.kept


def _advise(
    model: ModelProto,
    quantized: ModelProto,
    fused: ModelProto,
    layers: list[qdq.Layer],
    inputs: Inputs,
    context: Context,
) -> None:
    """Warn of what makes the result slower than it could be, here."""
    if left := fusion.unfused(fused):
        context.warn(
            f"ONNX Runtime has no integer operator for {len(left)} nodes that read rounded numbers, so they compute in "
            f"float: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}; keep their layers in float with `ignore`"
        )
    if slower := fusion.slower_kinds(model, quantized, layers, inputs, context.scratch):
        context.warn(f"8 bits are slower than float here for {', '.join(slower)}: keep them in float with `ignore`")


def _nothing(operators: tuple[str, ...]) -> StageError:
    return StageError(
        f"nothing was quantised: no weight of {', '.join(operators)} is a constant of the graph",
        hint="look at `ignore`, and whether the model is quantised already",
    )


def quantize_dynamic(model: ModelProto, kept: list[str], config: Config, scratch: Path) -> ModelProto:
    import onnx as library
    from onnxruntime import quantization

    path = scratch / "quantized.onnx"
    with quiet():
        try:
            quantization.quantize_dynamic(
                model,
                path,
                op_types_to_quantize=list(OPERATORS),
                # It first rewrites each Gemm as a MatMul of this name and an Add.
                nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept)],
                per_channel=config.per_channel,
                reduce_range=config.reduce_range,
                weight_type=quantization.QuantType.QInt8,
                extra_options={
                    "MatMulConstBOnly": True,
                    "WeightSymmetric": config.sym,
                    # Of a weight behind one of ONNX Runtime's own operators, which shape inference does not know.
                    "DefaultTensorType": library.TensorProto.FLOAT,
                },
            )
        except Exception as error:  # it raises whatever it stumbles over
            raise StageError(f"ONNX Runtime can't quantise the graph: {error}") from error
    return graphs.load(path)


def _lacks_vnni() -> bool:
    from optimize.evaluate.host import fingerprint

    flags = set(fingerprint()["cpu"]["flags"])
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}
