"""INT8 by ONNX Runtime: smaller, close to its parent, reproducible, and what is ignored stays in float."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from packaging.version import Version

from optimize import runtimes, tasks
from optimize.artifact import Artifact
from optimize.calibration import Calibration
from optimize.context import Context
from optimize.data import Data, prepare
from optimize.errors import StageError
from optimize.export import onnx as export
from optimize.progress import Progress
from optimize.quantize import int8_onnxruntime
from optimize.quantize.int8_onnxruntime import Config, run
from optimize.work import Work


class Listener(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.updates: list[tuple[float, float]] = []

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        self.updates.append((done, total))


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
    told = Listener()
    monkeypatch.setattr("optimize.evaluate.host.fingerprint", lambda: {"cpu": {"flags": ["avx2"]}})
    assert int8_onnxruntime._lacks_vnni()
    run(pico_graph, Config(), new_context(progress=told))
    assert any("reduce_range" in message for message in told.warnings)


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"), reason="transformers fuses for ONNX Runtime since 5.23"
)
def test_a_fused_graph_is_quantised_too(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    fused = export.run(pico_source, export.Config(fusions="cpu"), new_context())
    result = run(fused, Config(), new_context())
    assert result.details["quantized"]["MatMulInteger"] > 0


# Static


@pytest.fixture(scope="module")
def labelled(pico_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The pico rows with a calibration split."""
    task = tasks.get("text-classification")
    splits = {"train": 0.2, "validation": 0.2, "calibration": 0.3, "evaluation": 0.3}
    config = task.Data(source=str(pico_csv), splits=splits)
    return prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_csv.parent).for_stages()


def static(**settings: Any) -> Config:
    return Config(mode="static", calibration=Calibration(num_samples=40), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"calibrate": "mse", "smooth_quant": 0.5},
        {"calibrate": "entropy", "format": "qoperator"},
        {"calibrate": "percentile", "percentile": 99.9, "sym_activations": True},
        {"per_channel": False, "reduce_range": True, "sym": False},
    ],
)
def test_static_is_small_and_answers_like_its_parent(
    pico_graph: Artifact, new_context: Callable[..., Context], labelled: Data, settings: dict[str, Any]
) -> None:
    told = Listener()
    result = run(pico_graph, static(**settings), new_context(data=labelled, progress=told))
    assert floats(result) == set()
    assert result.details["quantized"] == {"Gather": 3, "MatMul": 12, "Gemm": 2}
    # Random weights have zeros for biases, one for all layers, so nothing is folded.
    smoothed = {"folded": 0, "multiplied": 11} if "smooth_quant" in settings else None
    assert result.details.get("smooth_quant") == smoothed
    operators = {node.op_type for node in onnx.load(result.path / "model.onnx").graph.node}
    assert ("MatMulIntegerToFloat" in operators) is (settings.get("format") == "qoperator")
    expected = logits(pico_graph, new_context())
    assert np.abs(logits(result, new_context()) - expected).max() < 0.15 * np.abs(expected).max()
    assert not any("no integer operator" in message for message in told.warnings)
    passes = 1 + ("smooth_quant" in settings) + ("calibrate" in settings)
    assert told.updates[-1] == (5 * passes, 5 * passes)


def test_static_bytes_are_the_same_again(
    pico_graph: Artifact, new_context: Callable[..., Context], labelled: Data
) -> None:
    config = static(smooth_quant=0.5, calibrate="percentile", format="qoperator")
    first, second = (run(pico_graph, config, new_context(data=labelled)) for _ in range(2))
    assert first.digest == second.digest


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_budget_keeps_the_planted_layer_in_float(
    pico_graph: Artifact, new_context: Callable[..., Context], labelled: Data, mode: str, tmp_path: Path
) -> None:
    """One weight gets an outlier in every row, so that one scale for the matrix leaves the others nothing."""
    bad = "bert.encoder.layer.1.intermediate.dense/MatMul"
    shutil.copytree(pico_graph.path, tmp_path / "model")
    model = onnx.load(tmp_path / "model" / "model.onnx")
    (node,) = (node for node in model.graph.node if node.name == bad)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight[:, 0] = 3000
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, tmp_path / "model" / "model.onnx")
    parent = Artifact.from_directory(tmp_path / "model", format="onnx", task=pico_graph.task)
    # Random weights know no labels: what counts here is the order, and that nothing else is kept.
    ignore = ("bert.encoder.layer.0.*", "bert.embeddings.*")
    settings: dict[str, Any] = {"mode": mode, "per_channel": False, "max_drop": 0.0, "ignore": ignore}
    if mode == "static":
        settings["calibration"] = Calibration(num_samples=16)
    result = run(parent, Config(**settings), new_context(data=labelled))
    sensitivity = result.details["sensitivity"]
    assert next(iter(sensitivity["layers"])) == bad
    assert len(sensitivity["layers"]) == 8
    assert sensitivity["chosen"] >= sensitivity["float"]
    assert len(result.details["kept"]) <= 1


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="smooth_quant: only mode: static looks at that"):
        Config(smooth_quant=0.5)
    with pytest.raises(ValueError, match="percentile: calibrate: minmax does not look at that"):
        Config(mode="static", percentile=99.0)


def test_static_without_calibration_rows_is_an_error(pico_graph: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match="no calibration split"):
        run(pico_graph, static(), new_context())
