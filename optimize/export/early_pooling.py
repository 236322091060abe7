"""Compute only the tokens that the head reads.

A classifier reads one token of the last layer, so of that layer only this token's query, row of attention, projection,
feed-forward and norms are needed; keys and values are still those of all tokens. The `Gather` that picks the token is
moved up, past every operator that works on tokens one by one, as far as all that is computed on the way is read at
this token alone. The answers stay the same; in the last of MiniLM's six layers, ten of twelve parts of the linear work
go away. An operator that is not known stops it, and where the whole sequence is read (mean pooling, a label for each
token) nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx_ir

_ARITHMETIC = {"Abs", "Add", "Cast", "Clip", "Div", "Exp", "Max", "Min", "Mul", "Neg", "Pow", "Sqrt", "Sub", "Where"}
_ACTIVATIONS = {"Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Tanh"}
_ELEMENTWISE = _ARITHMETIC | _ACTIVATIONS | {"BiasGelu", "FastGelu", "QuickGelu"}
"""A place of the output depends on the same place of the inputs, which may be broadcast."""
_NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
"""The same but for the attribute `axis` and the axes behind it."""
_ALONG_AN_AXIS = {"Softmax": -1, "LogSoftmax": -1, "Split": 0}
"""The same but for the attribute `axis`, whose default is this, and of the first input alone."""

Shape = tuple["int | str | None", ...]
"""Sizes of axes: known, named or unknown."""


class Cut(NamedTuple):
    """What is read of a value: one place along one axis."""

    axis: int
    place: int


def pool_early(model: onnx_ir.Model) -> None:
    """Move the choice of a token up, in place. Values need the shapes that the exporter gives them."""
    cuts: dict[tuple[onnx_ir.Node, int], Cut] = {}
    """(node, number of an input) -> all that the node reads of it."""
    narrowed: dict[onnx_ir.Node, Cut] = {}
    for node in reversed(model.graph):
        if picked := _picked(node):
            cuts[node, 0] = picked
        elif (cut := _read(node, cuts)) and (needs := _needs(node, cut)) is not None:
            narrowed[node] = cut
            cuts |= {(node, position): need for position, need in needs.items()}
    gathered: dict[tuple[onnx_ir.Value | None, Cut], onnx_ir.Value] = {}
    for (node, position), cut in cuts.items():
        value = node.inputs[position]
        if value is not None and value.producer() in narrowed:
            if node not in narrowed:  # it picks from what has one place now
                _set_input(node, 1, [0] if _shape(node.inputs[1]) else 0)
        elif node in narrowed:
            if (value, cut) not in gathered:
                gathered[value, cut] = _gather(node, position, cut)
            node.replace_input_with(position, gathered[value, cut])
    for node, cut in narrowed.items():
        _resize(node, cut)


def _picked(node: onnx_ir.Node) -> Cut | None:
    """The cut of a node that picks one place along one axis."""
    if node.op_type != "Gather":
        return None
    shape, index = _shape(node.inputs[0]), node.inputs[1]
    if shape is None or index is None or index.const_value is None or index.const_value.size != 1:
        return None
    return Cut(node.attributes.get_int("axis", 0) % len(shape), index.const_value.numpy().item())


def _read(node: onnx_ir.Node, cuts: dict[tuple[onnx_ir.Node, int], Cut]) -> Cut | None:
    """The cut that is all that others read of a node, where it is one and the same."""
    if any(output.is_graph_output() for output in node.outputs):
        return None
    found = {cuts.get((use.node, use.idx)) for output in node.outputs for use in output.uses()}
    return found.pop() if len(found) == 1 else None


def _needs(node: onnx_ir.Node, cut: Cut) -> dict[int, Cut] | None:
    """Number of an input -> the cut of it that a node needs in order to compute a cut of its output.

    Inputs that it needs whole are left out. None: that is not known.
    """
    kind, axis, index = node.op_type, *cut
    inputs = {position: _shape(value) for position, value in enumerate(node.inputs) if value is not None}
    output = _shape(node.outputs[0])
    if output is None:
        return None
    if kind in _ELEMENTWISE or (kind in _NORMS and axis < node.attributes.get_int("axis", -1) % len(output)):
        return _broadcast(inputs, output, cut)
    if kind in _ALONG_AN_AXIS:
        along = node.attributes.get_int("axis", _ALONG_AN_AXIS[kind]) % len(output)
        return {0: cut} if along != axis else None
    if kind == "MatMul":
        ranks = [len(shape or ()) for shape in inputs.values()]
        return {0: Cut(ranks[0] - 2, index)} if min(ranks) > 1 and axis == len(output) - 2 else None
    if kind == "Transpose" and "perm" in node.attributes:
        return {0: Cut(node.attributes["perm"].as_ints()[axis], index)}
    if kind == "Reshape":
        # One size may be left to count: of the axes up to this one all others are copied from the input.
        before, free = inputs[0], [size for size in output[axis + 1 :] if not isinstance(size, int)]
        same = before is not None and before[: axis + 1] == output[: axis + 1] and None not in output[: axis + 1]
        return {0: cut} if same and len(free) < 2 else None
    return None


def _broadcast(inputs: dict[int, Shape | None], output: Shape, cut: Cut) -> dict[int, Cut] | None:
    needs = {}
    for position, shape in inputs.items():
        if shape is None:
            return None
        axis = cut.axis - len(output) + len(shape)
        if axis < 0 or shape[axis] == 1:
            continue
        if shape[axis] is None or shape[axis] != output[cut.axis]:
            return None
        needs[position] = Cut(axis, cut.place)
    return needs


def _shape(value: onnx_ir.Value | None) -> Shape | None:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def _gather(reader: onnx_ir.Node, position: int, cut: Cut) -> onnx_ir.Value:
    """A cut of what a node reads, whose axis stays."""
    import onnx_ir

    value, graph = reader.inputs[position], reader.graph
    assert value is not None
    assert value.shape is not None
    assert graph is not None
    axis = onnx_ir.AttrInt64("axis", cut.axis)
    node = onnx_ir.Node("", "Gather", [value, None], [axis], metadata_props=dict(reader.metadata_props))
    made = node.outputs[0]
    made.type, made.shape = value.type, onnx_ir.Shape(value.shape)
    made.shape[cut.axis] = 1
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    _set_input(node, 1, [cut.place])
    return made


def _resize(node: onnx_ir.Node, cut: Cut) -> None:
    """Let a node know that its outputs have one place along an axis."""
    import onnx_ir

    if node.op_type == "Reshape":
        behind = (_shape(node.outputs[0]) or ())[cut.axis + 1 :]
        node.attributes.pop("allowzero", None)  # 0: as in the input
        _set_input(node, 1, [0] * cut.axis + [1] + [size if isinstance(size, int) else -1 for size in behind])
    for output in node.outputs:
        if output.shape is not None:
            output.shape = onnx_ir.Shape(output.shape)
            output.shape[cut.axis] = 1


def _set_input(node: onnx_ir.Node, position: int, numbers: list[int] | int) -> None:
    """Give a node whole numbers of its own."""
    import numpy as np
    import onnx_ir

    assert node.graph is not None
    name = f"{node.outputs[0].name}_{'shape' if node.op_type == 'Reshape' else 'index'}"
    tensor = onnx_ir.tensor(np.array(numbers, dtype=np.int64), name=name)
    constant = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(tensor.shape.numpy()), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    node.graph.register_initializer(constant)
    node.replace_input_with(position, constant)
