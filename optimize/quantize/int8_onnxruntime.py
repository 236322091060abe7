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
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize import graphs
from optimize.quiet import quiet
from optimize.runtimes import onnx

if TYPE_CHECKING:
    from onnx import ModelProto

VERSION = 1

_OPERATORS = ("MatMul", "Gemm", "Attention", "Gather", "EmbedLayerNormalization")
"""What is quantised where its weight is a constant."""
_RESULTS = ("MatMulInteger", "QAttention", "DequantizeLinear", "QEmbedLayerNormalization")
"""What becomes of them (`DequantizeLinear` follows a quantised embedding)."""


class Config(Block):
    """`quantize: int8`."""

    mode: Literal["dynamic"] = "dynamic"
    """`dynamic`: weights ahead of time, activations as they come."""
    per_channel: bool = True
    """A scale for each output channel of a weight instead of one for all."""
    sym: bool = True
    """Weights' codes lie evenly around 0; False shifts them to use the whole range."""
    reduce_range: bool = False
    """7-bit weights, for processors without VNNI, whose 8-bit sums can overflow."""
    ignore: tuple[str, ...] = ()
    """Globs of node names, or of their weights' names, that stay in float."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where an `ignore` glob matches nothing or nothing could be quantised."""
    source = artifact.path / onnx.MODEL
    model = graphs.load(source)
    kept = graphs.matching(model, _OPERATORS, config.ignore)
    quantized = _quantize(model, kept, config, context.scratch)
    counts = Counter(node.op_type for node in quantized.graph.node)
    done = {name: counts[name] for name in _RESULTS if counts[name]}
    if not done:
        raise StageError(
            f"nothing was quantised: no weight of {', '.join(_OPERATORS)} is a constant of the graph",
            hint="look at `ignore`, and whether the model is quantised already",
        )
    if not config.reduce_range and _lacks_vnni():
        context.warn("this processor has no VNNI, so that 8-bit sums can overflow: try reduce_range: true")
    details = {"mode": config.mode, "quantized": done, "ignored": kept}
    return graphs.finished(quantized, artifact, context, details)


def _quantize(model: ModelProto, kept: list[str], config: Config, scratch: Path) -> ModelProto:
    import onnx as library
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = scratch / "quantized.onnx"
    with quiet():
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=list(_OPERATORS),
                # It first rewrites each Gemm as a MatMul of this name and an Add.
                nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept)],
                per_channel=config.per_channel,
                reduce_range=config.reduce_range,
                weight_type=QuantType.QInt8,
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
