"""An ONNX model that reaches out of its folder, or wants to run a library, is refused before it is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.errors import OptimizeError
from optimize.source.folder import load_folder

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
    return helper.make_model(graph, ir_version=10)


def external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, with a secret beside it."""
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(folder: Path, content: onnx.ModelProto | bytes) -> Path:
    raw = content if isinstance(content, bytes) else content.SerializeToString()
    (folder / "model.onnx").write_bytes(raw)
    return folder


def test_data_beside_the_model_is_fine(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(WEIGHT.tobytes())
    artifact = load_folder(write(folder, model(weight=external("model.onnx.data"))))
    assert artifact.format == "onnx"
    assert set(artifact.files) == {"config.json", "model.onnx", "model.onnx.data"}


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/hostname", "a/../../secret", "C:\\secret", "..\\secret", "", "*/_ORT_MEM_ADDR_/*"]
)
def test_data_outside_the_folder_is_refused(folder: Path, location: str) -> None:
    with pytest.raises(OptimizeError, match="no plain file of its folder"):
        load_folder(write(folder, model(weight=external(location))))


def test_data_through_a_link_is_refused(folder: Path) -> None:
    (folder / "weights").symlink_to(folder.parent / "secret")
    with pytest.raises(OptimizeError, match="link"):
        load_folder(write(folder, model(weight=external("weights"))))


def test_data_through_a_hard_link_is_refused(folder: Path) -> None:
    os.link(folder.parent / "secret", folder / "weights")
    with pytest.raises(OptimizeError, match="link"):
        load_folder(write(folder, model(weight=external("weights"))))


def test_data_below_a_linked_folder_is_refused(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)
    with pytest.raises(OptimizeError, match="link"):
        load_folder(write(folder, model(weight=external("sub/secret"))))


def test_data_hidden_in_a_subgraph_or_a_second_graph_is_found(folder: Path) -> None:
    branch = helper.make_graph(
        [], "b", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3])], [external("../secret")]
    )
    hidden = model()
    hidden.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    # Protobuf merges a second graph into the first.
    twice = model().SerializeToString() + onnx.ModelProto(graph=branch).SerializeToString()
    for content in (hidden, twice):
        with pytest.raises(OptimizeError, match="no plain file of its folder"):
            load_folder(write(folder, content))


def test_operators_of_a_library_are_refused(folder: Path) -> None:
    with pytest.raises(OptimizeError, match=r"operators of 'evil\.corp'"):
        load_folder(write(folder, model(domain="evil.corp", op="Run")))


@pytest.mark.parametrize("content", [b"\x80\x04N.", b"ORTM", b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_file_is_refused(folder: Path, content: bytes) -> None:
    with pytest.raises(OptimizeError, match="can't be read"):
        load_folder(write(folder, content))
