"""4-bit weights of an ONNX graph, by ONNX Runtime: the cheap alternative to GPTQ, with no calibration.

Each matrix product with a constant weight becomes a `MatMulNBits`, which computes on the packed weights
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Codes are rounded to the nearest, or by
HQQ (half-quadratic quantisation; Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog/), which moves the zero
points so that large errors weigh less.

    stages:
      - export: onnx
      - quantize: int4
        block_size: 32
        ignore: ["lm_head/*"]

HQQ's zero points are floats, for which ONNX Runtime 1.31 has no kernel on the CPU: it unpacks weights at every call,
and one token takes several times as long as in float32 (of a matrix of 1536 x 1536: 6.1 ms, 0.6 in float32, 0.16 by
`round`). Smaller blocks are the faster way to smaller errors there: `round` with a `block_size` of 16 is as near.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

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

_RESULTS = ("MatMulNBits", "GatherBlockQuantized")
_PACKED = (*_RESULTS, "MatMulBnb4")
"""Operators that hold 4-bit weights."""
_INT4_OPSET = 21
"""The standard operators' version that knows 4-bit tensors."""


class Config(Block):
    """`quantize: int4`."""

    algorithm: Literal["round", "hqq"] = "round"
    """How codes are found: round to the nearest, or half-quadratic."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Neighbouring inputs that share a scale; the last block of a row may be smaller."""
    sym: bool = False
    """Codes lie evenly around 0; False shifts them to use the whole range (and always does with `hqq`)."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """What ONNX Runtime may round activations to: 1 float32, 2 float16, 3 bfloat16, 4 8-bit integers; 0: its choice."""
    embedding: bool = False
    """Store token embeddings in 4 bits, too (only with `round`)."""
    ignore: tuple[str, ...] = ()
    """Globs of node names, or of their weights' names, that stay in float."""

    @model_validator(mode="after")
    def _only_with_round(self) -> Config:
        if self.algorithm == "hqq" and (self.sym or self.embedding):
            raise ValueError("sym and embedding go with algorithm: round only")
        return self


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where a glob matches nothing, nothing can be quantised, or it is so already."""
    model = graphs.load(artifact.path / onnx.MODEL)
    if packed := sorted({node.op_type for node in model.graph.node} & {*_PACKED}):
        raise StageError(
            f"the graph holds 4-bit weights already ({', '.join(packed)})",
            hint="export the stage whose weights are in float (`from:`), or leave `quantize: int4` out",
        )
    operators = ("MatMul", "Gather") if config.embedding else ("MatMul",)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if config.embedding and opset < _INT4_OPSET:
        raise StageError(
            f"4-bit embeddings need opset {_INT4_OPSET}, and the graph has {opset}",
            hint=f"set `opset: {_INT4_OPSET}` in `export: onnx`",
        )
    kept = graphs.matching(model, operators, config.ignore)
    quantized = _quantize(model, operators, kept, config)
    counts = Counter(node.op_type for node in quantized.graph.node)
    done = {name: counts[name] for name in _RESULTS if counts[name]}
    if not done:
        raise StageError(
            f"nothing was quantised: no weight of {', '.join(operators)} is a constant matrix of the graph",
            hint="look at `ignore`, and whether the model is quantised already",
        )
    if config.algorithm == "hqq":
        context.warn("on a CPU, ONNX Runtime unpacks HQQ's weights at every call: this is slower than float32")
    details = {"algorithm": config.algorithm, "quantized": done, "ignored": kept}
    return graphs.finished(quantized, artifact, context, details)


def _quantize(model: ModelProto, operators: tuple[str, ...], kept: list[str], config: Config) -> ModelProto:
    from onnx import helper
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    settings: Any
    if config.algorithm == "hqq":
        settings = library.HQQWeightOnlyQuantConfig(block_size=config.block_size)
    else:
        settings = library.DefaultWeightOnlyQuantConfig(
            block_size=config.block_size, is_symmetric=config.sym, op_types_to_quantize=operators
        )
    with quiet():
        try:
            quantizer = library.MatMulNBitsQuantizer(model, nodes_to_exclude=kept, algo_config=settings)
            quantizer.process()
        except Exception as error:  # it raises whatever it stumbles over
            raise StageError(f"ONNX Runtime can't quantise the graph: {error}") from error
    result: ModelProto = quantizer.model.model
    for node in result.graph.node:
        if node.op_type == "MatMulNBits" and config.accuracy_level:
            node.attribute.append(helper.make_attribute("accuracy_level", config.accuracy_level))
    # A weight that several nodes share was quantised, with the same result, for each of them.
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    del result.graph.initializer[:]
    result.graph.initializer.extend(tensors.values())
    return result
