"""Export to ONNX (https://onnx.ai), by the exporter of transformers, which goes through `torch.export`.

    stages:
      - export: onnx
        opset: 20
        tolerance: 1e-4

The batch and the length stay free. The file is opened in ONNX Runtime and answers real validation rows of several
lengths and batch sizes; where it differs from the parent by more than `tolerance`, the stage fails. Nodes are named
after the PyTorch modules that they came from (`bert.encoder.layer.0.attention.self.query/MatMul`), which is what the
`ignore` globs of later stages match.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.quiet import quiet
from optimize.runtimes.onnx import MODEL
from optimize.tasks import Inputs

if TYPE_CHECKING:
    import onnx_ir

VERSION = 1

_CHECKED_ROWS = 33
_LARGEST_FILE = 2_000_000_000
"""Bytes of weights above which they lie beside the graph: protobuf ends at 2 GiB."""


class Config(Block):
    """`export: onnx`."""

    opset: int | None = Field(None, ge=18)
    """Version of the standard operators; the default is the newest that the exporter writes."""
    fusions: Literal["none", "cpu", "cuda"] = "none"
    """Fuse nodes into ONNX Runtime's own operators for this device ahead of time; other runtimes can't read the file
    then. ONNX Runtime also fuses by itself when it loads a file: on MiniLM, `cpu` made it slower."""
    tolerance: float = Field(1e-4, gt=0)
    """The largest absolute difference from the parent's outputs on real rows; more is an error."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
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
    _make_reproducible(graph)
    _save(graph, context.directory / MODEL)
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


def _make_reproducible(model: onnx_ir.Model) -> None:
    """Drop what holds paths of this machine or counts earlier work, and give names that a person can use."""
    names: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        name = f"{_module(node)}/{node.op_type}"
        names[name] += 1
        node.name = f"{name}_{names[name]}" if names[name] > 1 else name
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
                if not value.is_graph_output():
                    # Shapes can be inferred again; kept, they go stale when a later stage changes a weight.
                    value.shape = value.type = None
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            for axis, name in zip(range(len(value.shape)), ("batch", "length"), strict=False):
                if not isinstance(value.shape[axis], int):
                    value.shape[axis] = name


def _module(node: onnx_ir.Node) -> str:
    """The PyTorch module a node came from (its exporter notes the scopes, outermost first and the operation last)."""
    import ast

    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 and scopes[-2] else "graph"


def _save(model: onnx_ir.Model, path: Path) -> None:
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights > _LARGEST_FILE else None)


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
