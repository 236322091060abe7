"""What ONNX Runtime makes of a quantised graph when it loads it, and whether that is a gain on this processor."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from optimize.quantize.qdq import Layer
    from optimize.tasks import Inputs

_ROUNDS = 5
_LOST = 0.01
"""Of the float graph's time: what a kind of layers may lose before it is worth a word."""


def fused(model: ModelProto, folder: Path) -> ModelProto:
    """The graph after ONNX Runtime's own fusions, without those that only this very processor understands."""
    import onnx
    import onnxruntime

    options = _options()
    path = folder / "fused.onnx"
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class of its own for every status
        raise StageError(f"ONNX Runtime can't open the quantised graph: {error}") from error
    result = onnx.load(path)
    path.unlink()
    return result


def with_biases(model: ModelProto) -> None:
    """Let `MatMulIntegerToFloat` add the bias of the `Add` or `BiasGelu` behind it, as it does for `mode: dynamic`.

    A `Gelu` alone takes less than two thirds of a `BiasGelu`'s time, and an addition in the kernel next to none.
    """
    biases = {tensor.name for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) == 1}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for node in list(model.graph.node):
        if node.op_type != "MatMulIntegerToFloat" or len(node.input) != 6 or len(readers[node.output[0]]) != 1:
            continue
        (behind,) = readers[node.output[0]]
        given = [name for name in behind.input if name in biases]
        if behind.op_type not in ("Add", "BiasGelu") or len(given) != 1:
            continue
        node.input.append(given[0])
        if behind.op_type == "BiasGelu":
            behind.op_type = "Gelu"
            behind.input.remove(given[0])
        else:
            node.output[0] = behind.output[0]
            model.graph.node.remove(behind)


def unfused(model: ModelProto) -> list[str]:
    """Of a graph after fusion: the nodes that read a dequantised number, in float; a looked-up embedding is no pair."""
    producers = {output: node for node in model.graph.node for output in node.output}
    pairs = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and getattr(producers.get(node.input[0]), "op_type", "") != "Gather"
    }
    return [f"{node.name} ({node.op_type})" for node in model.graph.node if pairs & set(node.input)]


def slower_kinds(
    before: ModelProto, after: ModelProto, layers: Sequence[Layer], inputs: Inputs, folder: Path
) -> list[str]:
    """Kinds of layers (operator and shape of the weight) whose operator takes longer on integers than it did in float.

    Told by ONNX Runtime's profiler on a batch, one thread, the least of a few rounds.
    """
    ours, theirs = (_seconds(model, inputs, folder) for model in (after, before))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in before.graph.initializer}
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for layer in layers:
        if layer.name in ours and layer.name in theirs and layer.operator != "Gather":
            shape = "x".join(map(str, shapes[layer.weight]))
            kinds[f"{layer.operator} {shape}"].append((ours[layer.name], theirs[layer.name]))
    slower = []
    for kind, pairs in kinds.items():
        after_all, before_all = (sum(column) for column in zip(*pairs, strict=True))
        if after_all - before_all > _LOST * sum(theirs.values()):
            slower.append(f"{kind} ({after_all / before_all:.1f} times)")
    return slower


def _seconds(model: ModelProto, inputs: Inputs, folder: Path) -> Mapping[str, float]:
    """The least time of each node's kernel."""
    import onnxruntime

    options = _options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {value.name: inputs[value.name] for value in session.get_inputs()}
    for _ in range(_ROUNDS):
        session.run(None, given)
    path = Path(session.end_profiling())
    events: list[dict[str, Any]] = json.loads(path.read_text())
    path.unlink()
    least: dict[str, float] = {}
    for event in events:
        name, kernel, rest = event["name"].partition("_kernel_time")
        if kernel and not rest:
            least[name] = min(least.get(name, float("inf")), event["dur"])
    return least


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options
