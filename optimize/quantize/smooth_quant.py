"""SmoothQuant (Xiao et al., 2022, https://arxiv.org/abs/2211.10438) on an ONNX graph.

A few columns of an activation are far larger than the others, and one scale for all of them leaves those few levels.
Dividing column j by

    s_j = max|x_j|^a / max|w_j|^(1 - a)

and multiplying row j of the weights that read it by the same changes nothing in float, and shares the trouble out
between activations and weights: a = 0 leaves it to the activations, a = 1 to the weights. Layers that read the same
activation share s.

The division is folded into what computes the activation where no other reader would notice: the weight and bias of a
LayerNormalization (also written out in simple nodes); the output columns of a linear layer, also from behind a ReLU,
and from behind attention, whose output columns are means of one column of the values each. Elsewhere a `Mul` is
inserted: behind a GELU, and behind the LayerNormalization of encoders such as BERT, which a residual connection reads
too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    from optimize.quantize.qdq import Layer

LINEAR = ("MatMul", "Gemm")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def smooth(
    model: ModelProto, layers: Sequence[Layer], maxima: Mapping[str, NDArray[np.float32]], strength: float
) -> dict[str, int]:
    """Smooth the inputs of the linear ones among `layers`; changes the graph, and nothing that it computes.

    `maxima` has the largest magnitude of each column of these inputs; `strength` is a. Gives how many activations were
    `folded` into what computes them, and how many `multiplied` by an inserted node.
    """
    import numpy as np

    graph = _Graph(model)
    done = {"folded": 0, "multiplied": 0}
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.operator in LINEAR:
            groups.setdefault(layer.input, []).append(layer)
    for edge, readers in groups.items():
        if not all(graph.is_own(layer.weight) and graph.arrays[layer.weight].ndim == 2 for layer in readers):
            continue  # such as a matrix that another node reads, too
        matrices = [np.moveaxis(graph.arrays[layer.weight], layer.inputs_axis, 0) for layer in readers]
        factors = _factors(maxima[edge], matrices, strength)
        if len(graph.readers[edge]) == len(readers) and graph.divide(edge, factors):
            done["folded"] += 1
        else:
            graph.multiply(edge, np.reciprocal(factors), [layer.name for layer in readers])
            done["multiplied"] += 1
        for layer in readers:
            weight = graph.arrays[layer.weight]
            graph.arrays[layer.weight] = weight * np.expand_dims(factors, 1 - layer.inputs_axis)
    graph.write()
    return done


def _factors(
    columns: NDArray[np.float32], weights: Sequence[NDArray[np.float32]], strength: float
) -> NDArray[np.float32]:
    """s of each column [n], of weights [n, outputs]; 1 where one of the two is all zeros."""
    import numpy as np

    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    used = (columns > 0) & (rows > 0)
    columns, rows = np.where(used, columns, 1), np.where(used, rows, 1)
    return (columns**strength / rows ** (1 - strength)).astype(np.float32)


class _Graph:
    """A graph whose constants can be changed; `write` puts them back."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        self._model = model
        self.arrays: dict[str, NDArray[Any]] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        self._before = dict(self.arrays)
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self.readers: dict[str, list[str]] = {value.name: ["(the caller)"] for value in model.graph.output}
        """Names of the nodes that read an edge, and of a result of the graph one more."""
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node.name)

    def is_own(self, name: str) -> bool:
        """Whether it is a constant in float that only one node reads."""
        return name in self.arrays and self.arrays[name].dtype == "float32" and len(self.readers[name]) == 1

    def divide(self, edge: str, factors: NDArray[np.float32]) -> bool:
        """Divide each column of an edge, whose readers all want it, in what computes it; False where that can't be."""
        node = self._producers.get(edge)
        if node is None:
            return False
        constants = [name for name in node.input if self.is_own(name) and self.arrays[name].size == len(factors)]
        others = [name for name in node.input if name not in self.arrays]
        if node.op_type == "MatMul" and self.is_own(node.input[1]):
            constants = [node.input[1]]
        elif node.op_type == "Gemm":
            if len(constants) != len(node.input) - 2 or not self.is_own(node.input[1]):
                return False
            across = factors[:, None] if _attribute(node, "transB", 0) else factors
            self.arrays[node.input[1]] = self.arrays[node.input[1]] / across
        elif node.op_type in _NORMS:
            if len(constants) < len(node.input) - 1 or _attribute(node, "axis", -1) != -1:
                return False
        elif node.op_type == "Mul":
            if len(constants) != 1:
                return False
        elif node.op_type == "Add":
            if len(constants) != 1 or len(others) != 1 or not self._divide_alone(others[0], factors):
                return False
        elif node.op_type == "Relu":
            return self._divide_alone(node.input[0], factors)
        else:
            values = self._values_of_attention(node)
            return values is not None and self._divide_alone(values, factors)
        for name in constants:
            self.arrays[name] = self.arrays[name] / factors
        return True

    def _divide_alone(self, edge: str, factors: NDArray[np.float32]) -> bool:
        return len(self.readers[edge]) == 1 and self.divide(edge, factors)

    def _values_of_attention(self, node: NodeProto) -> str | None:
        """Of the node that joins attention's heads: the edge of the values, before they are parted into heads."""
        path = (("Reshape", 0), ("Transpose", 0), ("MatMul", 1), ("Transpose", 0), ("Reshape", 0))
        edge = node.output[0]
        for step, (operator, place) in enumerate(path):
            producer = self._producers.get(edge)
            if producer is None or producer.op_type != operator or (step and len(self.readers[edge]) != 1):
                return None
            if operator == "Transpose" and _attribute(producer, "perm", None) != [0, 2, 1, 3]:
                return None
            edge = producer.input[place]
        return str(edge)

    def multiply(self, edge: str, vector: NDArray[np.float32], readers: Sequence[str]) -> None:
        """Give the readers (names of nodes) each column of an edge times a number."""
        from onnx import helper

        self.arrays[f"{edge}_smoothing"] = vector
        nodes = list(self._model.graph.node)
        first = min(i for i, node in enumerate(nodes) if node.name in readers)
        for node in nodes:
            if node.name in readers:
                node.input[0] = f"{edge}_smoothed"
        smoothing = helper.make_node("Mul", [edge, f"{edge}_smoothing"], [f"{edge}_smoothed"], f"{edge}/smoothing")
        self._model.graph.node.insert(first, smoothing)

    def write(self) -> None:
        from onnx import numpy_helper

        for tensor in self._model.graph.initializer:
            if self.arrays[tensor.name] is not self._before[tensor.name]:
                tensor.CopyFrom(numpy_helper.from_array(self.arrays[tensor.name], tensor.name))
        for name in [name for name in self.arrays if name not in self._before]:
            self._model.graph.initializer.append(numpy_helper.from_array(self.arrays[name], name))


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
