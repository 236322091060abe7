"""Export to OpenVINO (https://docs.openvino.ai), the fastest runtime for encoders on processors with VNNI or AMX.

    stages:
      - export: openvino
        precision: fp32
      - quantize: int8

A transformers artifact goes through the graph of `export: onnx`, an ONNX artifact is taken as it is: what is quantised
there (nodes `QuantizeLinear` and `DequantizeLinear`) computes in INT8 here. The batch and the length stay free, and
layers keep the names that they have in ONNX, those of the PyTorch modules
(`bert.encoder.layer.0.attention.self.query/MatMul`). The files, `model.xml` and `model.bin`, answer real validation
rows of several lengths and batch sizes; where they differ from the parent by more than `tolerance`, the stage fails.

Left alone, OpenVINO computes in bfloat16 on processors that can. Ours does so only with `precision: bf16`, which stands
in the file.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.evaluate.host import computes_in
from optimize.export import onnx, openvino_graph
from optimize.export.parity import Check
from optimize.quantize import openvino_fusion
from optimize.quiet import quiet
from optimize.runtimes.onnx import MODEL
from optimize.runtimes.openvino import PRECISION, library, reason

if TYPE_CHECKING:
    import openvino

VERSION = 1

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
_QUANTIZED = 0.5
"""Of a quantised graph: where a number lies between two codes, one runtime takes this and the other that."""


class Config(Block):
    """`export: openvino`."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """`fp16`: weights are stored in 16 bits and computed with in 32. `bf16`: weights are stored in 32 bits and computed
    with in bfloat16, twice as fast where the processor can."""
    batch_size: int | None = Field(None, ge=1)
    """Rows of a call, no more and no fewer; None leaves it free. Our runtime pads and splits."""
    sequence_length: int | None = Field(None, ge=1)
    """Tokens of a row, no more and no fewer; None leaves it free."""
    tolerance: float | None = Field(None, gt=0)
    """The largest absolute difference from the parent's outputs on real rows; more is an error. By default 1e-4 in
    fp32, 1e-2 in fp16 and 1e-1 in bf16; 0.5 where the ONNX graph is quantised, since runtimes round differently."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
    graph = _graph(artifact, config, context)
    graph.copy_files(context.directory, lambda name: not name.startswith(MODEL))
    model = _read(graph.path / MODEL)
    if config.precision == "bf16":
        model.set_rt_info("bf16", PRECISION)
        if not computes_in("bfloat16"):
            context.warn("this processor has no arithmetic in bfloat16: it computes in float32")
    if graph.details.get("mode") == "dynamic":
        context.warn(
            "OpenVINO computes in float what ONNX Runtime rounds as it comes (mode: dynamic): quantise with mode: "
            "static, or after this stage"
        )
    openvino_graph.save(model, context.directory, half=config.precision == "fp16")
    parent = replace(artifact, task=graph.task)  # a fixed length makes rows shorter
    with quiet():
        task, trust = context.task, artifact.trust_remote_code
        check = Check(parent, context, task.preprocessor(artifact.path, trust_remote_code=trust))
    tolerance = config.tolerance or (_QUANTIZED if "quantized" in graph.details else TOLERANCES[config.precision])
    hint = "try precision: fp32, or export: onnx; raise `tolerance` only if such a difference is harmless"
    result = Artifact.from_directory(
        context.directory,
        format="openvino",
        task=graph.task,
        details={"precision": config.precision, **check.compare("openvino", tolerance, hint)},
        trust_remote_code=trust,
    )
    if "quantized" in graph.details:
        openvino_fusion.advise(context.directory, context)
    return result


def _graph(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """The model as an ONNX artifact."""
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    if artifact.format != "onnx":
        folder = context.scratch / "onnx"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return onnx.run(artifact, onnx.Config(**sizes), replace(context, directory=folder))
    if any(sizes.values()):
        raise StageError("the ONNX graph has its sizes already", hint="set them in export: onnx")
    return artifact


def _read(path: Path) -> openvino.Model:
    """Raises `StageError` where OpenVINO does not know an operator."""
    try:
        model: openvino.Model = library().Core().read_model(path)
    except RuntimeError as error:
        raise StageError(
            f"OpenVINO can't read the ONNX graph: {reason(error)}",
            hint="leave `fusions: none` in export: onnx, or take the transformers artifact (`from:`)",
        ) from error
    return model
