"""Only the tokens that the head reads are computed, and the answers stay the same."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from onnx import shape_inference
from onnx.parser import parse_model

from optimize.export.early_pooling import pool_early

WEIGHT = ", ".join(map(str, np.random.default_rng(1).normal(size=16).round(3)))
HEADER = f"""
    <ir_version: 9, opset_import: ["": 20]>
    f (float[batch, length, 4] x) => (float[batch, 4] y)
    <float[4, 4] w = {{{WEIGHT}}}, int64 i = {{1}}, int64[1] axes = {{1}}>
"""
TOKENS = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)


def graph(body: str) -> onnx_ir.Model:
    """A graph from `x` with a weight `w`, its shapes known."""
    proto = parse_model(f"{HEADER} {{ {body} }}")
    return onnx_ir.serde.deserialize_model(shape_inference.infer_shapes(proto))


def answer(model: onnx_ir.Model) -> np.ndarray:
    content = onnx_ir.serde.serialize_model(model).SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content).run(None, {"x": TOKENS})[0])


def sizes(model: onnx_ir.Model) -> dict[str, str]:
    """How many tokens of each value are computed."""
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    return {str(name): str(shape[1]) for name, shape in shapes.items() if shape and len(shape) == 3}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            "a = MatMul(x, w) b = Add(a, x) c = Gelu(b) y = Gather<axis=1>(c, i)",
            {"a": "1", "b": "1", "c": "1"},
            id="all the way up",
        ),
        pytest.param(
            "a = MatMul(x, w) b = Softmax<axis=1>(a) c = Relu(b) y = Gather<axis=1>(c, i)",
            {"a": "length", "b": "length", "c": "1"},
            id="up to an operator along the tokens",
        ),
        pytest.param(
            "a = MatMul(x, w) b = CumSum(a, i) c = Relu(b) y = Gather<axis=1>(c, i)",
            {"a": "length", "b": "length", "c": "1"},
            id="up to an operator that is not known",
        ),
        pytest.param(
            "a = MatMul(x, w) b = Relu(a) c = ReduceSum<keepdims=0>(a, axes) d = Gather<axis=1>(b, i) y = Add(c, d)",
            {"a": "length", "b": "1"},
            id="up to what others read whole",
        ),
        pytest.param(
            "a = MatMul(x, w) k = Transpose<perm=[0, 2, 1]>(x) s = MatMul(a, k) p = Softmax(s) b = MatMul(p, x) "
            "n = Constant<value_floats=[1.0, 2.0, 3.0, 4.0]>() c = LayerNormalization(b, n) y = Gather<axis=1>(c, i)",
            {"a": "1", "k": "4", "s": "1", "p": "1", "b": "1", "c": "1"},
            id="through attention",
        ),
        pytest.param(
            "a = MatMul(x, w) b = Relu(a) y = ReduceMean<keepdims=0>(b, axes)",
            {"a": "length", "b": "length"},
            id="nowhere for a mean",
        ),
        pytest.param(
            "a = MatMul(x, w) b = Relu(a) c = Gather<axis=1>(b, i) z = Constant<value_int=0>() "
            "d = Gather<axis=1>(b, z) y = Add(c, d)",
            {"a": "length", "b": "length"},
            id="nowhere for two tokens",
        ),
    ],
)
def test_the_choice_of_a_token_moves(body: str, expected: dict[str, str]) -> None:
    model = graph(body)
    before = answer(model)
    pool_early(model)
    found = sizes(model)
    assert {name: found[name] for name in expected} == expected
    np.testing.assert_allclose(answer(model), before, atol=1e-6)
