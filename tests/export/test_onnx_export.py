"""Export to ONNX: same answers, same bytes, and an error where the answers differ."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import optimize
from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import Data
from optimize.errors import EvaluationError, StageError
from optimize.export import onnx_graph
from optimize.export.onnx import Config, run


@pytest.fixture(scope="module")
def exported(pico_source: Artifact, new_context: Callable[..., Context]) -> Artifact:
    return run(pico_source, Config(), new_context())


def test_the_folder_serves_without_us(exported: Artifact, pico_source: Artifact) -> None:
    assert set(exported.files) == {"config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    session = onnxruntime.InferenceSession(exported.path / "model.onnx")
    model = AutoModelForSequenceClassification.from_pretrained(pico_source.path).eval()
    for texts in (["good"], ["a fine film", "a very dull story with the weak plot", "bad"], ["film " * 40] * 5):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        feed = {value.name: batch[value.name].numpy() for value in session.get_inputs() if value.name in batch}
        feed |= {
            value.name: np.zeros_like(feed["input_ids"]) for value in session.get_inputs() if value.name not in feed
        }
        expected = model(**batch).logits.detach().numpy()
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-5)
    assert exported.details["tolerance"] == 1e-4
    assert exported.details["max_difference"] < 1e-5
    assert exported.details["checked_batches"] == [1, 1, 7, 33]


def test_inputs_have_names_for_their_axes_and_nodes_the_names_of_modules(exported: Artifact) -> None:
    graph = onnx.load(exported.path / "model.onnx").graph
    for value in graph.input:
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "length"]
    assert "bert.encoder.layer.1.attention.self.query/MatMul" in {node.name for node in graph.node}
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_the_bytes_are_the_same_again_and_hold_no_path(
    exported: Artifact, pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    assert run(pico_source, Config(), new_context()).digest == exported.digest
    content = (exported.path / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(exported.path.parent).encode() not in content


def test_the_opset_is_the_one_asked_for(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_source, Config(opset=18), new_context())
    versions = {entry.domain: entry.version for entry in onnx.load(result.path / "model.onnx").opset_import}
    assert versions[""] == result.details["opset"] == 18


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"), reason="transformers fuses for ONNX Runtime since 5.23"
)
def test_fusions_use_operators_of_onnx_runtime(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_source, Config(fusions="cpu"), new_context())
    assert "com.microsoft" in {node.domain for node in onnx.load(result.path / "model.onnx").graph.node}


def test_a_difference_past_the_tolerance_is_an_error(
    pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    with pytest.raises(StageError, match=r"differently from its parent: by .* \(tolerance 1e-12\) on validation row"):
        run(pico_source, Config(tolerance=1e-12), new_context())


def test_without_rows_to_check_with_it_refuses(
    pico_source: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="nothing to check the export with"):
        run(pico_source, Config(), new_context(data=Data(tmp_path, {}, {"train": 8})))


def test_nothing_is_printed(pico_model: Path, pico_csv: Path, tmp_path: Path) -> None:
    """In a process of its own: libraries speak on their first use."""
    code = f"""
from pathlib import Path
from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.export.onnx import Config, run
from optimize.work import Work
root = Path({str(tmp_path)!r})
task = tasks.get("text-classification")
data = prepare(task.Data(source={str(pico_csv)!r}), task, Work(root / "work"), root)
spec = {{"name": "text-classification", "max_length": 32, "labels": ["negative", "positive"]}}
for name in ("artifact", "scratch"):
    (root / name).mkdir()
source = Artifact.from_directory(Path({str(pico_model)!r}), format="transformers", task=spec)
run(source, Config(), Context(root / "artifact", root / "scratch", task, data, root / "logs"))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_fixed_sizes_are_filled_up_and_split(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_source, Config(batch_size=4, sequence_length=24), new_context())
    session = onnxruntime.InferenceSession(result.path / "model.onnx")
    assert {tuple(value.shape) for value in session.get_inputs()} == {(4, 24)}
    assert result.details["checked_batches"] == [1, 1, 7, 33]
    assert result.details["max_difference"] < 1e-5
    assert result.task["max_length"] == 24
    runner = runtimes.open_artifact(result, threads=1)
    assert runner.run({name: np.ones((5, 7), dtype=np.int64) for name in runner.takes})["logits"].shape == (5, 2)
    with pytest.raises(EvaluationError, match="takes rows of 24 tokens, and one has 25"):
        runner.run({name: np.ones((1, 25), dtype=np.int64) for name in runner.takes})


def test_half_precision(pico_source: Artifact, exported: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_source, Config(dtype="float16"), new_context())
    assert result.details["tolerance"] == 0.02
    assert 0 < result.details["max_difference"] < 0.02
    types = {tensor.data_type for tensor in onnx.load(result.path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert onnx.TensorProto.FLOAT not in types
    assert result.files["model.onnx"]["size"] < 0.7 * exported.files["model.onnx"]["size"]


def test_a_large_model_has_its_weights_beside_the_graph(
    pico_source: Artifact,
    exported: Artifact,
    new_context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_graph, "_LARGEST_FILE", 1000)
    result = run(pico_source, Config(), new_context())
    assert set(result.files) - set(exported.files) == {"model.onnx.data"}
    assert run(pico_source, Config(), new_context()).digest == result.digest
    tensors = onnx.load(result.path / "model.onnx", load_external_data=False).graph.initializer
    places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    assert places == {"model.onnx.data"}
    assert optimize.load(result.path, threads=1).predict(["good"])
    assert runtimes.get("onnx").parameters(result.path) == runtimes.get("onnx").parameters(exported.path)


def test_a_failure_names_the_layer(
    pico_source: Artifact, new_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertIntermediate

    def forward(self: object, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.sum() > 0:
            return hidden_states
        return -hidden_states

    monkeypatch.setattr(BertIntermediate, "forward", forward)
    with pytest.raises(StageError, match=r"can't be exported \(in bert\.encoder\.layer\.0\.intermediate"):
        run(pico_source, Config(), new_context())
