"""Export to ONNX (https://onnx.ai), by the exporter of transformers, which goes through `torch.export`.

    stages:
      - export: onnx
        opset: 20
        tolerance: 1e-4

The batch and the length stay free. The file is opened in ONNX Runtime and answers real validation rows of several
lengths and batch sizes; where it differs from the parent by more than `tolerance`, the stage fails. Nodes are named
after the PyTorch modules that they came from (`bert.encoder.layer.0.attention.self.query/MatMul`), which is what the
`ignore` globs of later stages match.

Causal language models take a way of their own (`decoder.py`), with a key/value cache and ONNX Runtime's operators, and
keep the codes of a GPTQ or bitsandbytes checkpoint:

    stages:
      - quantize: gptq
      - export: onnx
        lm_head: int8
        float_activations: ["*.layers.29.mlp.gate_proj", "*.layers.29.mlp.up_proj"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import onnx_graph
from optimize.quiet import quiet
from optimize.runtimes.onnx import MODEL
from optimize.tasks import Inputs

if TYPE_CHECKING:
    import onnx_ir

VERSION = 1

_CHECKED_ROWS = 33


class Config(Block):
    """`export: onnx`."""

    opset: int | None = Field(None, ge=18)
    """Version of the standard operators; the default is the newest that the exporter writes."""
    fusions: Literal["none", "cpu", "cuda"] = "none"
    """Of an encoder: fuse nodes into ONNX Runtime's own operators for this device ahead of time; other runtimes can't
    read the file then. ONNX Runtime also fuses by itself when it loads a file: on MiniLM, `cpu` made it slower."""
    tolerance: float = Field(1e-4, gt=0)
    """The largest absolute difference from the parent's outputs on real rows; more is an error. Of a language model it
    is a share of the largest logit, and holds for the graph with activations in float32."""
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


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
    if context.task.generates:
        from optimize.export import decoder

        return decoder.run(artifact, config, context)
    task, spec, trust = context.task, artifact.task, artifact.trust_remote_code
    if not context.data.num_rows.get("validation"):
        raise StageError("nothing to check the export with", hint="give `data.splits.validation` a share of the rows")
    with quiet():
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
        preprocessor.save_pretrained(context.directory)  # before use, which leaves its truncation in what is saved
        features = task.encode(preprocessor, context.data.rows("validation"), spec)
        checks = [
            (rows, task.collate(preprocessor, [features[row] for row in rows]))
            for rows in _batches_to_check([max(map(len, row.values())) for row in features])
        ]
        model = task.load_model(artifact.path, spec, trust_remote_code=trust)
        model.config._name_or_path = ""
        model.config.save_pretrained(context.directory)
        context.update(0, 2, "tracing")
        graph = _export(model, checks[-1][1], config)
    onnx_graph.make_reproducible(graph)
    onnx_graph.save(graph, context.directory / MODEL)
    context.update(1, 2, "comparing with the parent")
    difference = _compare(artifact, checks, config.tolerance, context)
    return Artifact.from_directory(
        context.directory,
        format="onnx",
        task=spec,
        details={
            "opset": graph.opset_imports[""],
            "tolerance": config.tolerance,
            # One digit: the rest says more about the processor than about the file.
            "max_difference": float(f"{difference:.0e}"),
            "checked_batches": [len(rows) for rows, _ in checks],
        },
        trust_remote_code=trust,
    )


def _batches_to_check(lengths: list[int]) -> list[list[int]]:
    """Row numbers: the shortest and the longest alone, then an odd and a full batch of rows of all lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    wanted = min(_CHECKED_ROWS, len(order))
    spread = [order[i * (len(order) - 1) // max(1, wanted - 1)] for i in range(wanted)]
    return [spread[:1], spread[-1:], spread[:: max(1, wanted // 7)][:7], spread]


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
        inputs = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    # transformers before 5.23 (the last for Python 3.10) knows no fusions and gives torch's own `ONNXProgram`.
    fusions: dict[str, Any] = {} if config.fusions == "none" else {"ort_fusions": config.fusions}
    try:
        settings = OnnxConfig(dynamic=True, opset_version=config.opset, **fusions)
        exporter: Any = OnnxExporter()  # type: ignore[no-untyped-call]
        exported = exporter.export(model, inputs, config=settings)
        graph: onnx_ir.Model = exported.program if hasattr(exported, "program") else exported.model
    except Exception as error:  # the exporter raises whatever torch does
        reason = str(error).strip().partition("\n")[0]
        raise StageError(
            f"the model can't be exported: {type(error).__name__}: {reason}", hint="try another opset, or fusions: none"
        ) from error
    return graph


def _compare(parent: Artifact, checks: list[tuple[list[int], Inputs]], tolerance: float, context: Context) -> float:
    """The largest absolute difference of the answers. Raises `StageError` where it is past the tolerance."""
    import numpy as np

    ours = runtimes.get("onnx").open(context.directory, threads=1)
    theirs = runtimes.open_artifact(parent, threads=1)
    largest = 0.0
    for rows, inputs in checks:
        got = context.task.read_outputs(ours.run(inputs), inputs)
        expected = context.task.read_outputs(theirs.run(inputs), inputs)
        differences = np.abs(got - expected).reshape(len(rows), -1).max(axis=1)
        # A comparison that NaN fails, too.
        wrong = [row for row, difference in zip(rows, differences, strict=True) if not difference <= tolerance]
        if wrong:
            raise StageError(
                f"the ONNX file answers differently from its parent: by {differences.max():.2g} "
                f"(tolerance {tolerance:g}) on validation row{'s' if len(wrong) > 1 else ''} {_listed(wrong)}, "
                f"in a batch of {len(rows)}",
                hint="try fusions: none or another opset; raise `tolerance` only if such a difference is harmless",
            )
        largest = max(largest, float(differences.max()))
    return largest


def _listed(rows: list[int]) -> str:
    return ", ".join(str(row + 1) for row in rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
