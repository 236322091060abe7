"""Quantise/dequantise pairs: near the float graph, on a grid that fits, and fused by ONNX Runtime without a rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from optimize.quantize import fusion, qdq
from optimize.quantize.activation_ranges import Activations, ranges
from optimize.quantize.rounding import activation_grid, weight_codes

LINEAR = """<ir_version: 10, opset_import: ["" : 20]>
graph (int64[rows] ids) => (float[rows, 4] y, float[rows, 6] z) {
    x = Gather (table, ids)
    a = Gemm <transB = 1> (x, w1, b1)
    b = MatMul (x, w2)
    c = Relu (b)
    y = MatMul (c, w3)
    z = Add (a, c)
}"""
TEXT = """<ir_version: 10, opset_import: ["" : 20]>
graph (int64[rows, length] ids) => (float[rows, length, 4] y) {
    x = Gather (table, ids)
    b = MatMul (x, w2)
    c = Add (b, b2)
    d = Gelu (c)
    e = MatMul (d, w3)
    y = Add (b3, e)
}"""
IMAGES = """<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 3, 12, 12] x) => (float[batch, 5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, k1, b1)
    r = Relu (a)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    c = Conv <pads = [1, 1, 1, 1]> (p, k2, b2)
    d = Add (c, p)
    e = Relu (d)
    f = Conv <pads = [1, 1, 1, 1]> (e, k3, b3)
    g = Relu (f)
    m = GlobalAveragePool (g)
    n = Flatten (m)
    y = Gemm (n, w4, b4)
}"""


def model_of(text: str, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    for i, node in enumerate(model.graph.node):
        node.name = f"{i}/{node.op_type}"
    return model


@pytest.fixture
def linear() -> onnx.ModelProto:
    return model_of(LINEAR, {"table": (50, 8), "w1": (6, 8), "b1": (6,), "w2": (8, 6), "w3": (6, 4)})


@pytest.fixture
def images() -> onnx.ModelProto:
    kernels = {f"k{i}": (4, 4 if i > 1 else 3, 3, 3) for i in (1, 2, 3)}
    return model_of(IMAGES, {**kernels, "b1": (4,), "b2": (4,), "b3": (4,), "w4": (4, 5), "b4": (5,)})


def answers(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def quantizer_of(
    model: onnx.ModelProto,
    inputs: dict[str, np.ndarray],
    *,
    sym: bool = True,
    sym_activations: bool = False,
    per_channel: bool = True,
) -> qdq.Quantizer:
    layers = qdq.layers(model, ())
    edges = list({edge: None for layer in layers for edge in layer.rounded})
    found = ranges(
        Activations(model, edges), [inputs], "minmax", percentile=100, sym=sym_activations, tick=lambda: None
    )
    return qdq.Quantizer(
        model, layers, found, per_channel=per_channel, sym=sym, sym_activations=sym_activations, bits=8
    )


def near(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(got - expected).max() < 0.03 * np.abs(expected).max())


IDS = {"ids": np.arange(50)}
PIXELS = {"x": np.random.default_rng(1).standard_normal((4, 3, 12, 12)).astype(np.float32)}


@pytest.mark.parametrize("settings", [{}, {"sym": False}, {"sym_activations": True}, {"per_channel": False}])
def test_linear_layers_answer_nearly_like_float_and_fuse(
    linear: onnx.ModelProto, tmp_path: Path, settings: dict[str, bool]
) -> None:
    expected = answers(linear, IDS)
    quantizer = quantizer_of(linear, IDS, **settings)
    exact = answers(quantizer.without(["0/Gather", "1/Gemm", "2/MatMul", "4/MatMul"]), IDS)
    assert all(got == pytest.approx(want, rel=1e-5, abs=1e-5) for got, want in zip(exact, expected, strict=True))
    quantized = quantizer.without(())
    assert all(near(got, want) for got, want in zip(answers(quantized, IDS), expected, strict=True))
    floats = {tensor.name for tensor in quantized.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1}
    assert floats == set()
    assert Counter(node.op_type for node in quantized.graph.node)["QuantizeLinear"] == 2  # `x` is shared
    fused = fusion.fused(quantized, tmp_path)
    counts = Counter(node.op_type for node in fused.graph.node)
    assert (counts["MatMulIntegerToFloat"], counts["QGemm"]) == (2, 1)
    assert fusion.unfused(fused) == []
    assert [list(array.ravel()) for array in answers(fused, IDS)] == [
        list(array.ravel()) for array in answers(quantized, IDS)
    ]


def test_one_layer_can_stay_in_float(linear: onnx.ModelProto) -> None:
    quantized = quantizer_of(linear, IDS).without(["2/MatMul"])
    readers = {node.name: node.input[0] for node in quantized.graph.node}
    assert readers["2/MatMul"] == "x"
    assert readers["1/Gemm"] == "x_dequantized"


def test_an_embedding_that_is_the_head_as_well_is_stored_once(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    graph (int64[rows] ids) => (float[rows, 50] y) { x = Gather (table, ids) y = Gemm <transB = 1> (x, table) }"""
    model = model_of(text, {"table": (50, 8)})
    expected = answers(model, IDS)
    quantized = quantizer_of(model, IDS).without(())
    assert [tensor.name for tensor in quantized.graph.initializer if len(tensor.dims) == 2] == ["table_codes"]
    assert near(answers(quantized, IDS)[0], expected[0])
    assert near(answers(quantizer_of(model, IDS).without(["0/Gather"]), IDS)[0], expected[0])
    assert fusion.unfused(fusion.fused(quantized, tmp_path)) == []


def test_convolutions_fuse_with_what_stands_between_them(images: onnx.ModelProto, tmp_path: Path) -> None:
    expected = answers(images, PIXELS)
    quantized = quantizer_of(images, PIXELS).without(())
    assert near(answers(quantized, PIXELS)[0], expected[0])
    counts = Counter(node.op_type for node in fusion.fused(quantized, tmp_path).graph.node)
    assert counts["QLinearConv"] == 3
    assert counts["Conv"] == counts["Relu"] == 0


def test_what_does_not_fuse_is_named(linear: onnx.ModelProto, tmp_path: Path) -> None:
    quantized = quantizer_of(linear, IDS).without(())
    for node in quantized.graph.node:
        if node.name == "5/Add":
            node.input[1] = "c_dequantized"
    assert fusion.unfused(fusion.fused(quantized, tmp_path)) == ["5/Add (Add)"]


def test_slower_kinds_are_told(linear: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = quantizer_of(linear, IDS)
    quantized = quantizer.without(())
    times = fusion._seconds(quantized, IDS, tmp_path)
    assert {"1/Gemm", "2/MatMul", "4/MatMul"} <= set(times)
    told = iter([{"1/Gemm": 3.0, "2/MatMul": 1.001, "5/Add": 1.0}, {"1/Gemm": 1.0, "2/MatMul": 1.0, "5/Add": 9.0}])
    monkeypatch.setattr(fusion, "_seconds", lambda *_: next(told))
    layers = qdq.layers(linear, ())
    assert fusion.slower_kinds(linear, quantized, layers, IDS, tmp_path) == ["Gemm 6x8 (3.0 times)"]


def test_weights_are_rounded_to_the_nearest_code() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32) + 1
    for axis in (None, 0, -1):
        for sym in (True, False):
            codes = weight_codes(weight, axis, sym=sym)
            shape = {None: (), 0: (16, 1), -1: (4,)}[axis]
            scale, zero = codes.scale.reshape(shape), codes.zero.reshape(shape).astype(int)
            error = np.abs(scale * (codes.codes.astype(int) - zero) - weight)
            assert (error <= 0.501 * scale).all()
            assert codes.codes.min() < -100 or sym
            assert bool(codes.zero.any()) is not sym
    assert np.abs(weight_codes(weight, -1, sym=True, bits=7).codes).max() == 63


def test_zero_is_exact_on_an_activations_grid() -> None:
    for low, high, sym in (
        (-1.0, 3.0, False),
        (0.0, 2.0, False),
        (-3.0, 0.0, False),
        (-3.0, 3.0, True),
        (0.0, 0.0, False),
    ):
        scale, zero = activation_grid(low, high, sym=sym)
        assert 0 <= zero <= 255
        assert scale * (0 - zero) <= low + scale / 2
        assert scale * (255 - zero) >= high - scale / 2


def test_biases_move_into_the_integer_operator(tmp_path: Path) -> None:
    model = model_of(TEXT, {"table": (50, 8), "w2": (8, 6), "b2": (6,), "w3": (6, 4), "b3": (4,)})
    ids = {"ids": np.arange(50).reshape(5, 10)}
    fused = fusion.fused(quantizer_of(model, ids).without(()), tmp_path)
    expected = answers(fused, ids)
    before = Counter(node.op_type for node in fused.graph.node)
    fusion.with_biases(fused)
    after = Counter(node.op_type for node in fused.graph.node)
    assert (before["BiasGelu"], before["Gelu"], before["Add"]) == (1, 0, 1)
    assert (after["BiasGelu"], after["Gelu"], after["Add"]) == (0, 1, 0)
    assert answers(fused, ids)[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
