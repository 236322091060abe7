"""INT8 by ONNX Runtime: smaller, close to its parent, reproducible, and what is ignored stays in float."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import onnx
import pytest
from packaging.version import Version

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import onnx as export
from optimize.progress import Progress
from optimize.quantize import int8_onnxruntime
from optimize.quantize.int8_onnxruntime import Config, run


def logits(artifact: Artifact, context: Context) -> np.ndarray:
    tokenizer = context.task.preprocessor(artifact.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), artifact.task)
    inputs = context.task.collate(tokenizer, features)
    return context.task.read_outputs(runtimes.open_artifact(artifact, 1).run(inputs), inputs)


def floats(artifact: Artifact) -> set[str]:
    """Names of the matrices that are still in float."""
    graph = onnx.load(artifact.path / "model.onnx").graph
    return {tensor.name for tensor in graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1}


@pytest.mark.parametrize("settings", [{}, {"per_channel": False}, {"reduce_range": True}, {"sym": False}])
def test_it_is_small_and_answers_like_its_parent(
    pico_graph: Artifact, new_context: Callable[..., Context], settings: dict[str, bool]
) -> None:
    context = new_context()
    result = run(pico_graph, Config(**settings), context)
    assert floats(result) == set()
    # Two layers of six matrices, the pooler and the classifier; three embeddings.
    assert result.details == {
        "mode": "dynamic",
        "quantized": {"MatMulInteger": 14, "DequantizeLinear": 3},
        "ignored": [],
    }
    weights = {
        name: artifact.files["model.onnx"]["size"] for name, artifact in (("parent", pico_graph), ("int8", result))
    }
    assert weights["int8"] < 0.65 * weights["parent"]
    assert set(result.files) == set(pico_graph.files)
    assert result.task == pico_graph.task
    expected = logits(pico_graph, context)
    assert np.abs(logits(result, context) - expected).max() < 0.15 * np.abs(expected).max()


def test_the_bytes_are_the_same_again_and_hold_no_path(
    pico_graph: Artifact, new_context: Callable[..., Context]
) -> None:
    first, second = (run(pico_graph, Config(), new_context()) for _ in range(2))
    assert first.digest == second.digest
    assert str(first.path.parent).encode() not in (first.path / "model.onnx").read_bytes()


def test_ignored_modules_stay_in_float(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    ignore = ("bert.encoder.layer.0.*", "*word_embeddings.weight")
    result = run(pico_graph, Config(ignore=ignore), new_context())
    assert result.details["quantized"] == {"MatMulInteger": 8, "DequantizeLinear": 2}
    assert "bert.encoder.layer.0.attention.self.query/MatMul" in result.details["ignored"]
    assert "bert.embeddings.word_embeddings.weight" in floats(result)


def test_a_glob_that_matches_nothing_is_an_error(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match=r"'decoder\.\*' matches no node") as caught:
        run(pico_graph, Config(ignore=("decoder.*",)), new_context())
    assert "node names look like 'bert." in str(caught.value.hint)


def test_nothing_quantised_is_an_error(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match="nothing was quantised"):
        run(pico_graph, Config(ignore=("*",)), new_context())


def test_a_processor_without_vnni_is_advised(
    pico_graph: Artifact, new_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Listener(Progress):
        def warn(self, name: str, message: str) -> None:
            told.append(message)

    monkeypatch.setattr("optimize.evaluate.host.fingerprint", lambda: {"cpu": {"flags": ["avx2"]}})
    assert int8_onnxruntime._lacks_vnni()
    run(pico_graph, Config(), new_context(progress=Listener()))
    assert any("reduce_range" in message for message in told)


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"), reason="transformers fuses for ONNX Runtime since 5.23"
)
def test_a_fused_graph_is_quantised_too(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    fused = export.run(pico_source, export.Config(fusions="cpu"), new_context())
    result = run(fused, Config(), new_context())
    assert result.details["quantized"]["MatMulInteger"] > 0
