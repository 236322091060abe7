"""4-bit ONNX graphs: smaller, close to their parents, reproducible, and what is ignored stays in float."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.progress import Progress
from optimize.quantize.int4_onnxruntime import Config, run


def logits(artifact: Artifact, context: Context) -> np.ndarray:
    tokenizer = context.task.preprocessor(artifact.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), artifact.task)
    inputs = context.task.collate(tokenizer, features)
    return context.task.read_outputs(runtimes.open_artifact(artifact, 1).run(inputs), inputs)


def nodes(artifact: Artifact, operator: str) -> list[onnx.NodeProto]:
    graph = onnx.load(artifact.path / "model.onnx").graph
    return [node for node in graph.node if node.op_type == operator]


@pytest.mark.parametrize(
    "settings", [{}, {"sym": True}, {"algorithm": "hqq"}, {"block_size": 16, "accuracy_level": 0}, {"block_size": 128}]
)
def test_it_is_small_and_answers_like_its_parent(
    pico_graph: Artifact, new_context: Callable[..., Context], settings: dict[str, Any]
) -> None:
    context = new_context()
    config = Config(**settings)
    result = run(pico_graph, config, context)
    assert result.details == {"algorithm": config.algorithm, "quantized": {"MatMulNBits": 12}, "ignored": []}
    for node in nodes(result, "MatMulNBits"):
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (4, config.block_size)
        assert attributes.get("accuracy_level", 0) == config.accuracy_level
        assert len(node.input) == (3 if config.sym else 4)
    assert result.size_bytes < pico_graph.size_bytes
    assert set(result.files) == set(pico_graph.files)
    expected = logits(pico_graph, context)
    assert 0 < np.abs(logits(result, context) - expected).max() < 0.5 * np.abs(expected).max()


def test_codes_are_those_nearest_to_the_weights(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_graph, Config(block_size=32, sym=True), new_context())
    before = {
        each.name: numpy_helper.to_array(each) for each in onnx.load(pico_graph.path / "model.onnx").graph.initializer
    }
    after = {each.name: numpy_helper.to_array(each) for each in onnx.load(result.path / "model.onnx").graph.initializer}
    for node in nodes(result, "MatMulNBits"):
        weight = before[node.input[1].removesuffix("_Q4")].T  # [out, in]
        packed, scales = after[node.input[1]], after[node.input[2]].reshape(len(weight), -1)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(weight.shape).astype(np.float32)
        held = ((codes - 8).reshape(*scales.shape, 32) * scales[..., None]).reshape(weight.shape)
        # No further than half a step, or a whole one where 8 would be next to the largest code, which is 7.
        assert np.all(np.abs(held - weight) <= np.repeat(np.abs(scales), 32, axis=1) * 1.001)
        assert np.mean(np.abs(held - weight) <= np.repeat(np.abs(scales), 32, axis=1) * 0.501) > 0.95


@pytest.mark.parametrize("algorithm", ["round", "hqq"])
def test_the_bytes_are_the_same_again_and_hold_no_path(
    pico_graph: Artifact, new_context: Callable[..., Context], algorithm: Any
) -> None:
    first, second = (run(pico_graph, Config(algorithm=algorithm), new_context()) for _ in range(2))
    assert first.digest == second.digest
    assert str(first.path.parent).encode() not in (first.path / "model.onnx").read_bytes()


def test_embeddings_on_request(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    context = new_context()
    with pytest.raises(StageError, match="4-bit embeddings need opset 21, and the graph has 20") as caught:
        run(pico_graph, Config(embedding=True), context)
    assert "`opset: 21`" in str(caught.value.hint)
    newer = onnx.load(pico_graph.path / "model.onnx")
    next(each for each in newer.opset_import if each.domain == "").version = 21
    folder = new_context().directory
    shutil.copytree(pico_graph.path, folder, dirs_exist_ok=True)
    onnx.save(newer, folder / "model.onnx")
    parent = Artifact.from_directory(folder, format="onnx", task=pico_graph.task)
    result = run(parent, Config(embedding=True), context)
    assert result.details["quantized"] == {"MatMulNBits": 12, "GatherBlockQuantized": 3}
    assert result.size_bytes < run(parent, Config(), new_context()).size_bytes
    expected = logits(parent, context)
    assert 0 < np.abs(logits(result, context) - expected).max() < np.abs(expected).max()


def test_ignored_nodes_stay_in_float(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_graph, Config(ignore=("bert.encoder.layer.0.*",)), new_context())
    assert result.details["quantized"] == {"MatMulNBits": 6}
    assert "bert.encoder.layer.0.attention.self.query/MatMul" in result.details["ignored"]
    with pytest.raises(StageError, match=r"'decoder\.\*' matches no node of MatMul"):
        run(pico_graph, Config(ignore=("decoder.*",)), new_context())
    with pytest.raises(StageError, match="nothing was quantised"):
        run(pico_graph, Config(ignore=("*",)), new_context())


def test_what_is_in_4_bits_already_is_refused(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    once = run(pico_graph, Config(), new_context())
    with pytest.raises(StageError, match=r"holds 4-bit weights already \(MatMulNBits\)"):
        run(once, Config(), new_context())


def test_a_weight_that_nodes_share_is_stored_once(new_context: Callable[..., Context]) -> None:
    """As in ALBERT, whose layers are all the same."""
    context = new_context()
    weight = numpy_helper.from_array(np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64), "weight")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["y"], "first"),
            helper.make_node("MatMul", ["y", "weight"], ["z"]),
        ],
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 64])],
        [weight],
    )
    folder = new_context().directory
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    result = run(Artifact.from_directory(folder, format="onnx", task={"name": "none"}), Config(), context)
    assert result.details["quantized"] == {"MatMulNBits": 2}
    names = [each.name for each in onnx.load(result.path / "model.onnx").graph.initializer]
    assert sorted(names) == ["weight_Q4", "weight_scales", "weight_zero_points"]


def test_hqq_is_said_to_be_slow(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    told: list[str] = []

    class Listener(Progress):
        def warn(self, name: str, message: str) -> None:
            told.append(message)

    run(pico_graph, Config(algorithm="hqq"), new_context(progress=Listener()))
    assert any("slower than float32" in message for message in told)


def test_hqq_knows_neither_symmetry_nor_embeddings() -> None:
    with pytest.raises(ValidationError, match="go with algorithm: round only"):
        Config(algorithm="hqq", sym=True)
