"""The ONNX runtime answers, counts, and refuses files that reach outside their folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.errors import EvaluationError
from optimize.runtimes import onnx as runtime

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def model(*, domain: str = "", op: str = "MatMul", weight: onnx.TensorProto | None = None) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", "w"], ["logits"], domain=domain)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weight or numpy_helper.from_array(WEIGHT, "w")],
    )
    domains = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def write(folder: Path, proto: onnx.ModelProto) -> Path:
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder


def external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_it_answers_and_takes_only_what_the_model_wants(tmp_path: Path) -> None:
    session = runtime.open(write(tmp_path, model()), threads=1)
    x = np.ones((4, 2), dtype=np.float32)
    outputs = session.run({"x": x, "token_type_ids": np.zeros((4, 2))})
    assert list(outputs) == ["logits"]
    np.testing.assert_array_equal(outputs["logits"], x @ WEIGHT)
    with pytest.raises(EvaluationError, match="wants x"):
        session.run({})
    with pytest.raises(EvaluationError, match="takes rows of 2 tokens, and one has 5"):
        session.run({"x": np.ones((4, 5), dtype=np.float32)})


def test_parameters_are_counted_from_the_file(tmp_path: Path) -> None:
    assert runtime.parameters(write(tmp_path, model())) == 6


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(WEIGHT.tobytes())
    write(tmp_path, model(weight=external("model.onnx.data")))
    assert runtime.parameters(tmp_path) == 6
    outputs = runtime.open(tmp_path, threads=1).run({"x": np.ones((1, 2), dtype=np.float32)})
    np.testing.assert_array_equal(outputs["logits"], [[3, 5, 7]])


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"ORTM", b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EvaluationError, match="can't open it"):
        runtime.open(tmp_path, threads=1)
