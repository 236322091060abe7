"""SmoothQuant computes the same in float, folds where it can, and makes what is rounded smoother."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from optimize.quantize import qdq
from optimize.quantize.activation_ranges import Activations, column_maxima
from optimize.quantize.smooth_quant import smooth

WIDTH = 8
HEAD = '<ir_version: 10, opset_import: ["" : 20]> graph (float[batch, length, 8] x) => (float[batch, length, 8] y) {'
NORM = "n = LayerNormalization (x, gamma, beta)"
GRAPHS = {
    # name -> (nodes, activations folded, multiplied)
    "behind a norm": (f"{NORM} a = MatMul (n, w1) b = MatMul (n, w2) y = Add (a, b)", 1, 0),
    "behind a norm that is read elsewhere": (f"{NORM} a = MatMul (n, w1) y = Add (a, n)", 0, 1),
    "behind a norm in simple nodes": (
        """mean = ReduceMean <keepdims = 1> (x, last) centred = Sub (x, mean) squared = Mul (centred, centred)
        variance = ReduceMean <keepdims = 1> (squared, last)
        deviation = Sqrt (variance) normed = Div (centred, deviation)
        scaled = Mul (normed, gamma) n = Add (scaled, beta) y = MatMul (n, w1)""",
        1,
        0,
    ),
    # The first layer's input comes from the caller.
    "behind a linear layer": ("a = MatMul (x, w1) b = Add (a, bias) y = MatMul (b, w2)", 1, 1),
    "behind a ReLU in a plain network": (
        """r = Reshape (x, rows) a = Gemm <transB = 1> (r, w1, bias) b = Relu (a) c = Gemm (b, w2, bias2)
        y = Reshape (c, one)""",
        1,
        1,
    ),
    "behind a ReLU": ("a = MatMul (x, w1) b = Add (a, bias) c = Relu (b) y = MatMul (c, w2)", 1, 1),
    "behind a GELU": ("a = MatMul (x, w1) b = Add (a, bias) c = Gelu (b) y = MatMul (c, w2)", 0, 2),
    "behind a residual sum": ("a = MatMul (x, w1) b = Add (a, x) y = MatMul (b, w2)", 0, 2),
    "behind attention": (
        """v = MatMul (x, w1) vb = Add (v, bias) vs = Reshape (vb, parted) values = Transpose <perm = [0, 2, 1, 3]> (vs)
        qs = Reshape (x, parted) queries = Transpose <perm = [0, 2, 1, 3]> (qs)
        keys = Transpose <perm = [0, 2, 3, 1]> (qs) scores = MatMul (queries, keys) shares = Softmax (scores)
        mixed = MatMul (shares, values) back = Transpose <perm = [0, 2, 1, 3]> (mixed) joined = Reshape (back, whole)
        y = MatMul (joined, w2)""",
        1,
        1,
    ),
}


def model_of(nodes: str) -> onnx.ModelProto:
    """The nodes with random constants, two columns of which make outliers."""
    model = onnx.parser.parse_model(f"{HEAD} {nodes} }}")
    rng = np.random.default_rng(0)
    outliers = np.where(np.arange(WIDTH) < 2, 30.0, 1.0)
    constants = {
        "gamma": outliers,
        "beta": rng.standard_normal(WIDTH) * outliers,
        "bias": rng.standard_normal(WIDTH) * outliers,
        "bias2": rng.standard_normal(WIDTH),
        "w1": rng.standard_normal((WIDTH, WIDTH)) * outliers,
        "w2": rng.standard_normal((WIDTH, WIDTH)),
    }
    for name, array in constants.items():
        if name in nodes:
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    for name, numbers in {
        "last": [-1],
        "parted": [0, 0, 2, 4],
        "whole": [0, 0, WIDTH],
        "rows": [-1, WIDTH],
        "one": [3, 5, WIDTH],
    }.items():
        if name in nodes:
            model.graph.initializer.append(numpy_helper.from_array(np.array(numbers), name))
    for i, node in enumerate(model.graph.node):
        node.name = f"{i}/{node.op_type}"
    return model


def answers(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_computes_the_same_and_folds_where_it_can(name: str, strength: float) -> None:
    nodes, folded, multiplied = GRAPHS[name]
    model = model_of(nodes)
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 5, WIDTH)).astype(np.float32)}
    expected = answers(model, inputs)

    def maxima() -> dict[str, np.ndarray]:
        edges = {layer.input: None for layer in qdq.layers(model, ())}
        return column_maxima(Activations(model, [*edges]), [inputs], lambda: None)

    done = smooth(model, qdq.layers(model, ()), maxima(), strength)
    assert done == {"folded": folded, "multiplied": multiplied}
    assert answers(model, inputs) == pytest.approx(expected, rel=1e-4, abs=1e-4 * float(np.abs(expected).max()))
    assert sum(node.name.endswith("/smoothing") for node in model.graph.node) == multiplied
    if strength == 1:  # all of it goes to the weights
        assert all(np.allclose(columns[columns > 0], 1, rtol=1e-4) for columns in maxima().values())


def test_the_factors_are_the_papers() -> None:
    model = model_of(f"{NORM} a = MatMul (n, w1) b = MatMul (n, w2) y = Add (a, b)")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    maxima = {"n": np.arange(1, WIDTH + 1, dtype=np.float32)}
    smooth(model, qdq.layers(model, ()), maxima, 0.25)
    rows = np.maximum(np.abs(arrays["w1"]).max(axis=1), np.abs(arrays["w2"]).max(axis=1))
    factors = maxima["n"] ** 0.25 / rows**0.75
    changed = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in ("w1", "w2"):
        assert changed[name] == pytest.approx(arrays[name] * factors[:, None], rel=1e-5)
    for name in ("gamma", "beta"):
        assert changed[name] == pytest.approx(arrays[name] / factors, rel=1e-5)


def test_a_dead_column_and_a_shared_matrix_are_left_alone() -> None:
    model = model_of(f"{NORM} y = MatMul (n, w1)")
    smooth(model, qdq.layers(model, ()), {"n": np.zeros(WIDTH, dtype=np.float32)}, 0.5)
    assert answers(model, {"x": np.ones((1, 1, WIDTH), dtype=np.float32)}).shape == (1, 1, WIDTH)
    shared = model_of(f"{NORM} a = MatMul (n, w1) y = MatMul (a, w1)")
    maxima = dict.fromkeys(("n", "a"), np.ones(WIDTH, dtype=np.float32))
    assert smooth(shared, qdq.layers(shared, ()), maxima, 0.5) == {
        "folded": 0,
        "multiplied": 0,
    }
