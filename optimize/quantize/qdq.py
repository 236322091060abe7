"""Quantise/dequantise pairs in an ONNX graph: what a runtime fuses with the operators between them.

A layer is a node with a constant weight. Its input goes through `QuantizeLinear` and `DequantizeLinear`, a pair that
layers with the same input share, and its weight is stored as codes behind a `DequantizeLinear`. The output of a MatMul
stays in float: ONNX Runtime makes one `MatMulIntegerToFloat` of it all, sums of products of bytes that are scaled once,
ready for the bias, GELU and LayerNormalization that it fuses around it. A Gemm becomes a `QGemm`, likewise. A Conv has
its output rounded as well, for there is no operator without that. An embedding is stored as codes that are looked up,
then scaled.

Activations are unsigned bytes and weights signed ones, which is what VNNI multiplies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.quantize.rounding import Codes, activation_grid, bias_codes, weight_codes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    from optimize.quantize.activation_ranges import Range

OPERATORS = ("MatMul", "Gemm", "Conv", "Gather")
"""What is quantised where its weight is a constant."""
_PASS_ON = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Operators whose output has the values of their input."""


@dataclass(frozen=True)
class Layer:
    """A node with a constant weight in float."""

    name: str
    operator: str
    input: str
    """The activation; of a Gather, the indices."""
    weight: str
    outputs_axis: int
    """Of the weight, along which output channels lie."""
    inputs_axis: int
    """Of the weight, along which input channels lie."""
    output: str | None
    """Of a Conv, what is rounded behind it: what the activation function gives where that alone follows."""

    @property
    def rounded(self) -> tuple[str, ...]:
        """The activations that are rounded for it."""
        if self.operator == "Gather":
            return ()
        return (self.input,) if self.output is None else (self.input, self.output)


def layers(model: ModelProto, ignore: Collection[str]) -> list[Layer]:
    """All that can be quantised, in the graph's order, without the nodes named in `ignore`."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        place = 0 if node.op_type == "Gather" else 1
        if node.op_type not in OPERATORS or node.name in ignore or node.input[place] not in constants:
            continue
        weight = constants[node.input[place]]
        if weight.data_type != 1 or len(weight.dims) < 2:
            continue
        outputs_axis, inputs_axis, output = len(weight.dims) - 1, len(weight.dims) - 2, None
        if node.op_type == "Gemm":
            if not _plain_gemm(node, constants):
                continue
            if _attribute(node, "transB", 0):
                outputs_axis, inputs_axis = 0, 1
        elif node.op_type == "Conv":
            outputs_axis, inputs_axis = 0, 1
            following = readers.get(node.output[0], [])
            behind = following[0] if len(following) == 1 and following[0].op_type in ("Relu", "Clip") else node
            output = behind.output[0] if behind.output[0] not in results else None
        activation = node.input[1 - place]
        found.append(Layer(node.name, node.op_type, activation, node.input[place], outputs_axis, inputs_axis, output))
    return found


def _plain_gemm(node: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Whether it is x W + b, as integer operators have it."""
    bias = node.input[2] if len(node.input) > 2 else ""
    return (
        not _attribute(node, "transA", 0)
        and _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1
        and (not bias or (bias in constants and len(constants[bias].dims) == 1))
    )


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(given) for given in node.attribute if given.name == name), default)


class Quantizer:
    """A float graph with the codes of its weights, so that each further choice of layers is made quickly."""

    def __init__(
        self,
        model: ModelProto,
        layers: Sequence[Layer],
        ranges: Mapping[str, Range],
        *,
        per_channel: bool,
        sym: bool,
        sym_activations: bool,
        bits: int,
    ) -> None:
        """`ranges` has every edge that is `rounded` for a layer; `per_channel`, `sym` and `bits` are the weights'."""
        from onnx import ModelProto, numpy_helper

        self._model = model
        self._bare = ModelProto()
        self._bare.CopyFrom(model)
        del self._bare.graph.initializer[:], self._bare.graph.node[:]
        self._layers = {layer.name: layer for layer in layers}
        self._floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._grids = {
            name: activation_grid(*bounds, sym=sym_activations) for name, bounds in _as_passed_on(model, ranges).items()
        }
        self._codes: dict[str, tuple[int | None, Codes]] = {}
        # A row that is looked up has to do with one scale for all; so has a head that is the same matrix.
        tables = {layer.weight for layer in layers if layer.operator == "Gather"}
        for layer in layers:
            axis = layer.outputs_axis if per_channel and layer.weight not in tables else None
            weight = self._floats[layer.weight]
            self._codes[layer.weight] = axis, weight_codes(weight, axis, sym=sym, bits=bits)

    def without(self, kept: Collection[str]) -> ModelProto:
        """The graph with every layer quantised but those `kept`."""
        from onnx import ModelProto, NodeProto

        chosen = {name: layer for name, layer in self._layers.items() if name not in kept}
        outputs = {layer.output for layer in chosen.values()}
        result = ModelProto()
        result.CopyFrom(self._bare)
        writer = _Writer(result.graph, self._grids)
        for node in self._model.graph.node:
            new = NodeProto()
            new.CopyFrom(node)
            layer = chosen.get(node.name)
            for i, name in enumerate(node.input):
                # Whatever reads a Conv's output reads it rounded, or the Conv would have no integer operator.
                if name in outputs or (layer is not None and name in layer.rounded):
                    new.input[i] = writer.pair(name)
            if layer is not None:
                axis, codes = self._codes[layer.weight]
                if layer.operator == "Gather":
                    writer.embedding(new, layer.weight, codes)
                    continue
                new.input[1] = writer.constant(layer.weight, codes, axis)
                if len(new.input) > 2 and node.input[2] in self._floats:
                    bias = bias_codes(self._floats[node.input[2]], self._grids[layer.input][0] * codes.scale)
                    new.input[2] = writer.constant(f"{node.name}/bias", bias, 0)
            result.graph.node.append(new)
        wanted = {name for node in result.graph.node for name in node.input}
        wanted |= {value.name for value in result.graph.output}
        result.graph.initializer.extend(tensor for tensor in self._model.graph.initializer if tensor.name in wanted)
        return result


class _Writer:
    """Appends nodes and constants to a graph, each once."""

    def __init__(self, graph: GraphProto, grids: Mapping[str, tuple[float, int]]) -> None:
        self._graph = graph
        self._grids = grids
        self._written: set[str] = set()

    def pair(self, edge: str) -> str:
        """An activation rounded and back again, right before its first reader."""
        import numpy as np

        result = f"{edge}_dequantized"
        if result not in self._written:
            self._written.add(result)
            scale, zero = self._grids[edge]
            grid = [
                self._store(f"{edge}_scale", np.float32(scale)),
                self._store(f"{edge}_zero", np.uint8(zero)),
            ]
            self._node("QuantizeLinear", [edge, *grid], f"{edge}_quantized", None)
            self._node("DequantizeLinear", [f"{edge}_quantized", *grid], result, None)
        return result

    def constant(self, name: str, codes: Codes, axis: int | None) -> str:
        """A weight or a bias as codes, and back again."""
        result = f"{name}_dequantized"
        if result not in self._written:
            self._written.add(result)
            self._node("DequantizeLinear", self._codes(name, codes), result, axis)
        return result

    def embedding(self, node: NodeProto, name: str, codes: Codes) -> None:
        """Codes that are looked up, then scaled."""
        result, looked_up = node.output[0], f"{node.output[0]}_codes"
        table, *grid = self._codes(name, codes)
        node.input[0], node.output[0] = table, looked_up
        self._graph.node.append(node)
        self._node("DequantizeLinear", [looked_up, *grid], result, None)

    def _codes(self, name: str, codes: Codes) -> list[str]:
        """Names of the codes, scale and zero point of a constant."""
        parts = {f"{name}_codes": codes.codes, f"{name}_scale": codes.scale, f"{name}_zero": codes.zero}
        if name not in self._written:
            self._written.add(name)
            for part, array in parts.items():
                self._store(part, array)
        return [*parts]

    def _store(self, name: str, array: Any) -> str:
        import numpy as np
        from onnx import numpy_helper

        self._graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _node(self, operator: str, inputs: Sequence[str], output: str, axis: int | None) -> None:
        from onnx import helper

        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        self._graph.node.append(helper.make_node(operator, inputs, [output], f"{output}/{operator}", **attributes))


def _as_passed_on(model: ModelProto, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The same range before and behind an operator that only passes values on, which so can work on the codes."""
    came_from = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _PASS_ON}

    def of(edge: str) -> Range:
        known = ranges[edge]
        while edge in came_from:
            edge = came_from[edge]
            known = ranges.get(edge, known)
        return known

    return {edge: of(edge) for edge in ranges}
