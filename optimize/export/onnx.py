"""Export to ONNX (https://onnx.ai), by the exporter of transformers, which goes through `torch.export`.

    stages:
      - export: onnx
        opset: 20
        tolerance: 1e-4

The batch and the length stay free, unless `batch_size` and `sequence_length` fix them: some accelerators want that, and
our runtime then pads smaller inputs and splits larger ones. The file is opened in ONNX Runtime and answers real
validation rows of several lengths and batch sizes; where it differs from the parent by more than `tolerance`, the stage
fails. Nodes are named after the PyTorch modules that they came from
(`bert.encoder.layer.0.attention.self.query/MatMul`), which is what the `ignore` globs of later stages match.

What the head does not read is not computed: of a classifier's last layer the first token alone (`early_pooling.py`).

Models with an encoder and a decoder become two graphs (`encoder_decoder.py`).

Causal language models take a way of their own (`decoder.py`), with a key/value cache and ONNX Runtime's operators, and
keep the codes of a GPTQ or bitsandbytes checkpoint:

    stages:
      - quantize: gptq
      - export: onnx
        lm_head: int8
        float_activations: ["*.layers.29.mlp.gate_proj", "*.layers.29.mlp.up_proj"]
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import onnx_graph
from optimize.export.early_pooling import pool_early
from optimize.export.failures import failed
from optimize.export.onnx_module import export_module
from optimize.export.parity import Check
from optimize.quiet import quiet
from optimize.runtimes import pytorch
from optimize.runtimes.onnx import MODEL
from optimize.tasks import Inputs

if TYPE_CHECKING:
    import onnx_ir

VERSION = 2


class Config(Block):
    """`export: onnx`."""

    opset: int | None = Field(None, ge=18)
    """Version of the standard operators; the default is the newest that the exporter writes."""
    batch_size: int | None = Field(None, ge=1)
    """Of an encoder: rows of a call, no more and no fewer; None leaves it free."""
    sequence_length: int | None = Field(None, ge=1)
    """Of an encoder: tokens of a row, no more and no fewer; None leaves it free."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of an encoder: of weights and arithmetic. `float16` is for GPUs; on a CPU, ONNX Runtime converts all along."""
    fusions: Literal["none", "cpu", "cuda"] = "none"
    """Of an encoder: fuse nodes into ONNX Runtime's own operators for this device ahead of time; other runtimes can't
    read the file then. ONNX Runtime also fuses by itself when it loads a file: on MiniLM, `cpu` made it slower."""
    tolerance: float | None = Field(None, gt=0)
    """The largest absolute difference from the parent's outputs on real rows; more is an error. The default is 1e-4,
    and 0.02 with `dtype: float16`. Of a language model it is a share of the largest logit, and holds for the graph with
    activations in float32."""
    lm_head: Literal["none", "int8", "int4"] = "none"
    """Of a language model: round the layer that gives the logits, and with it an embedding that is the same matrix, to
    codes in blocks of `block_size`. On small models they are most of the bytes."""
    block_size: Literal[16, 32, 64, 128] = 32
    """Of a language model: at most so many inputs of a layer on integer codes share a scale while they are rounded to
    8 bits; so do weights of a rounded head. The checkpoint's codes stay as they are: a group becomes several blocks.
    Smaller is more exact and slower. SmolLM2-135M in 4 bits, with 64, 32 and 16: 0.009, 0.004 and 0.002 nats from the
    checkpoint, and a token in 1, 1.17 and 1.57 of the time."""
    activations: Literal["int8", "float32"] = "int8"
    """Of a language model: what layers on integer codes, and a rounded head, round their inputs to while they compute.
    `float32` is exact, and slow: that model takes 1.5 times as long, but 16 times with a head of 8 bits, which ONNX
    Runtime then unpacks at every call."""
    float_activations: tuple[str, ...] = ()
    """Of a language model: globs of layers (never the head) that take their inputs in float32 all the same: those whose
    inputs have outliers, often the first and the last ones. With those behind the norms (`*.[qkv]_proj`, `*.gate_proj`,
    `*.up_proj`) that model is 0.002 nats from the checkpoint, and a token takes 1.1 of the time."""
    max_divergence: float = Field(0.05, gt=0)
    """Of a language model: how far the next tokens may be from the parent's on a real window, by rounding activations
    and the head (mean Kullback-Leibler divergence, in nats); more is an error."""

    @property
    def allowed(self) -> float:
        """`tolerance`, or its default."""
        return self.tolerance or (0.02 if self.dtype == "float16" else 1e-4)


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
    if context.task.generates:
        from optimize.export import decoder, encoder_decoder

        if config.batch_size or config.sequence_length or config.dtype != "float32":
            raise StageError("batch_size, sequence_length, dtype: a language model's graph takes any size, in float32")
        export = encoder_decoder.run if context.task.encodes else decoder.run
        return export(artifact, config, context)
    if config.sequence_length and "max_length" in artifact.task:
        shorter = min(config.sequence_length, artifact.task["max_length"])
        artifact = replace(artifact, task={**artifact.task, "max_length": shorter})
    task, spec, trust = context.task, artifact.task, artifact.trust_remote_code
    with quiet():
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
        preprocessor.save_pretrained(context.directory)  # before use, which leaves its truncation in what is saved
        check = Check(artifact, context, preprocessor)
        model = task.load_model(artifact.path, spec, trust_remote_code=trust)
        context.update(0, 2, "tracing")
        _, sample = check.batches[-1]
        if config.dtype == "float16":
            if any(array.dtype.kind == "f" for array in sample.values()):
                raise StageError("dtype: float16 is for models that take token ids; pixels stay in float32")
            model.half()
        if artifact.format == "pytorch":
            pytorch.write_config(context.directory, pytorch.described(artifact.path, spec))
            graph = export_module(model, sample, config.opset)
        else:
            model.config._name_or_path = ""
            model.config.save_pretrained(context.directory)
            graph = _export(model, sample, config)
    pool_early(graph)
    onnx_graph.make_reproducible(graph)
    onnx_graph.fix(graph, config.batch_size, config.sequence_length)
    onnx_graph.save(graph, context.directory / MODEL)
    context.update(1, 2, "comparing with the parent")
    hint = "try fusions: none or another opset; raise `tolerance` only if such a difference is harmless"
    return Artifact.from_directory(
        context.directory,
        format="onnx",
        task=spec,
        details={"opset": graph.opset_imports[""], **check.compare("onnx", config.allowed, hint)},
        trust_remote_code=trust,
    )


def _export(model: Any, sample: Inputs, config: Config) -> onnx_ir.Model:
    """The graph for inputs of any batch size and length."""
    import inspect

    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    # Fewer nodes than `sdpa`, whose export also guards rows without any token: 4 % faster on MiniLM in INT8.
    model.set_attn_implementation("eager")
    takes = inspect.signature(model.forward).parameters
    inputs = {name: torch.from_numpy(array) for name, array in sample.items() if name in takes}
    if len(next(iter(inputs.values()))) == 1:  # tracing would take it for a fixed size
        inputs = {name: tensor.repeat_interleave(2, 0) for name, tensor in inputs.items()}
    # transformers before 5.23 (the last for Python 3.10) knows no fusions and gives torch's own `ONNXProgram`.
    fusions: dict[str, Any] = {} if config.fusions == "none" else {"ort_fusions": config.fusions}
    try:
        # Pixels are as many as the image processor makes them.
        shapes = {
            name: dict.fromkeys(range(1 if tensor.is_floating_point() else tensor.ndim), torch.export.Dim.AUTO)
            for name, tensor in inputs.items()
        }
        settings = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=config.opset, **fusions)
        exporter: Any = OnnxExporter()  # type: ignore[no-untyped-call]
        exported = exporter.export(model, inputs, config=settings)
        graph: onnx_ir.Model = exported.program if hasattr(exported, "program") else exported.model
    except Exception as error:  # the exporter raises whatever torch does
        raise failed(error, model, "try another opset, or fusions: none") from error
    return graph
