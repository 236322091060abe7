"""Graphs after tracing: names a person can use, the same bytes every time, and nodes that belong together as one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

_LARGEST_FILE = 2_000_000_000
"""Bytes of weights above which they lie beside the graph: protobuf ends at 2 GiB."""


def make_reproducible(model: onnx_ir.Model) -> None:
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
        name_axes(value, "batch", "length")


def name_axes(value: onnx_ir.Value, *names: str) -> None:
    """Call the free axes of an input or output so; fixed ones stay."""
    if value.shape is not None:
        for axis, name in zip(range(len(value.shape)), names, strict=False):
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = name


def fix(model: onnx_ir.Model, batch: int | None, length: int | None) -> None:
    """Let the inputs take these sizes and no others; None leaves an axis free.

    Outputs keep the names of their axes: so whoever pads the inputs knows what to cut off.
    """
    for value in model.graph.inputs:
        sizes = {"batch": batch, "length": length}
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and (fixed := sizes.get(str(size.value))):
                value.shape[axis] = fixed  # type: ignore[index]


def _module(node: onnx_ir.Node) -> str:
    """The PyTorch module a node came from (its exporter notes the scopes, outermost first and the operation last)."""
    import ast

    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 and scopes[-2] else "graph"


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write the file, with its weights beside it where one file can't hold them."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights > _LARGEST_FILE else None)


def fuse(model: onnx_ir.Model) -> None:
    """Make single nodes of what a decoder's layers compute in several; the numbers stay the same."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    _straighten(model.graph)
    for node in list(model.graph):
        if node.op_type == "SimplifiedLayerNormalization":
            _add_residual(node)
        elif node.op_type == "GroupQueryAttention":
            _take_packed(node)
    passes.RemoveUnusedNodesPass()(model)


def _straighten(graph: onnx_ir.Graph) -> None:
    """Undo transpositions that undo each other, and reshapes of reshapes to what was there before."""
    for node in list(graph):
        before = _producer(node, 0)
        if node.op_type == "Transpose" and before is not None and before.op_type == "Transpose":
            inner, outer = before.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
            original = before.inputs[0]
            if original is not None and [inner[axis] for axis in outer] == list(range(len(inner))):
                node.outputs[0].replace_all_uses_with(original)
        elif node.op_type == "Reshape":
            source: Any = node.inputs[0]
            while source is not None and (above := source.producer()) is not None and above.op_type == "Reshape":
                source = above.inputs[0]
            target = node.outputs[0]
            # Batch and length have the same names everywhere, so equal shapes are the same shape.
            known = source is not None and source.shape is not None and not target.is_graph_output()
            if known and source.shape == target.shape:
                target.replace_all_uses_with(source)


def _add_residual(norm: onnx_ir.Node) -> None:
    """x + y, which goes on and is normalised: one node with two outputs."""
    import onnx_ir

    total = norm.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or add.op_type != "Add" or total.is_graph_output():
        return
    if any(value is None or value.const_value is not None or value.shape != total.shape for value in add.inputs):
        return
    fused = onnx_ir.Node(
        "com.microsoft",
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        [onnx_ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())],
        num_outputs=4,
        metadata_props=dict(norm.metadata_props),
    )
    graph = norm.graph
    assert graph is not None
    # Where the sum was made: what else reads it may stand before the norm.
    graph.insert_after(add, fused)
    for old, new in ((norm.outputs[0], fused.outputs[0]), (total, fused.outputs[3])):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
    graph.remove([norm, add], safe=True)


def _take_packed(attention: onnx_ir.Node) -> None:
    """Queries, keys and values that were computed as one are given as one."""
    parts = attention.inputs[:3]
    split = _producer(attention, 0)
    if split is None or split.op_type != "Split" or list(split.outputs) != list(parts):
        return
    attention.replace_input_with(0, split.inputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def _producer(node: onnx_ir.Node, index: int) -> onnx_ir.Node | None:
    value = node.inputs[index] if node.inputs else None
    return value.producer() if value is not None else None


def counts(model: onnx_ir.Model) -> dict[str, int]:
    """How many nodes there are of each of ONNX Runtime's own operators."""
    found = Counter(node.op_type for node in model.graph if node.domain == "com.microsoft")
    return dict(sorted(found.items()))


@contextlib.contextmanager
def accuracy_level(model: onnx_ir.Model, level: int) -> Iterator[None]:
    """Layers on packed codes compute with that `accuracy_level` inside."""
    import onnx_ir

    layers = {node: node.attributes["accuracy_level"] for node in model.graph if node.op_type == "MatMulNBits"}
    for node in layers:
        node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", level)
    try:
        yield
    finally:
        for node, attribute in layers.items():
            node.attributes["accuracy_level"] = attribute
