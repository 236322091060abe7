"""Export to OpenVINO: same answers, same bytes, and an error where the answers differ."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import optimize
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.export.openvino import Config, run
from optimize.runtimes import openvino as runtime


@pytest.fixture(scope="module")
def made(pico_source: Artifact, new_context: Callable[..., Context]) -> tuple[Artifact, Artifact]:
    """The exported model, and the ONNX artifact on the way to it."""
    context = new_context()
    result = run(pico_source, Config(), context)
    return result, Artifact.from_directory(context.scratch / "onnx", format="onnx", task=pico_source.task)


@pytest.fixture(scope="module")
def exported(made: tuple[Artifact, Artifact]) -> Artifact:
    return made[0]


@pytest.fixture(scope="module")
def graph(made: tuple[Artifact, Artifact]) -> Artifact:
    return made[1]


def test_the_folder_serves_without_us(exported: Artifact, pico_source: Artifact) -> None:
    files = {"config.json", "model.xml", "model.bin", "tokenizer.json", "tokenizer_config.json"}
    assert set(exported.files) == files
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    compiled = (
        runtime.library().Core().compile_model(exported.path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    model = AutoModelForSequenceClassification.from_pretrained(pico_source.path).eval()
    for texts in (["good"], ["a fine film", "a very dull story with the weak plot", "bad"], ["film " * 40] * 5):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        feed = {
            name: batch[name].numpy() if name in batch else np.zeros(batch["input_ids"].shape, dtype=np.int64)
            for name in (port.get_any_name() for port in compiled.inputs)
        }
        expected = model(**batch).logits.detach().numpy()
        np.testing.assert_allclose(compiled(feed)["logits"], expected, atol=1e-5)
    assert exported.details["precision"] == "fp32"
    assert exported.details["max_difference"] < 1e-5
    assert exported.details["checked_batches"] == [1, 1, 7, 33]


def test_layers_have_the_names_of_modules(exported: Artifact) -> None:
    model = runtime.library().Core().read_model(exported.path / "model.xml")
    names = [node.get_friendly_name() for node in model.get_ops()]
    assert "bert.encoder.layer.1.attention.self.query/MatMul" in names
    assert len(set(names)) == len(names)


def test_the_parameters_are_those_of_the_parent(exported: Artifact, pico_source: Artifact) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(pico_source.path)
    # Biases that are all zeros are one constant.
    assert runtime.parameters(exported.path) == pytest.approx(model.num_parameters(), rel=0.05)


def test_the_bytes_are_the_same_again_and_hold_no_path(
    exported: Artifact, graph: Artifact, new_context: Callable[..., Context]
) -> None:
    again = run(graph, Config(), new_context())
    assert again.files == exported.files
    content = (exported.path / "model.xml").read_text()
    assert "site-packages" not in content
    assert str(exported.path.parent) not in content


def test_a_fresh_process_writes_the_same_bytes(exported: Artifact, graph: Artifact, tmp_path: Path) -> None:
    """Names that OpenVINO makes up count everything that the process has ever made."""
    code = f"""
from pathlib import Path
from optimize.export import openvino, openvino_graph
openvino_graph.save(openvino._read(Path({str(graph.path)!r}) / "model.onnx"), Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    for name in ("model.xml", "model.bin"):
        assert (tmp_path / name).read_bytes() == (exported.path / name).read_bytes()


def test_floats_in_16_bits_are_half_as_large(
    exported: Artifact, graph: Artifact, new_context: Callable[..., Context]
) -> None:
    half = run(graph, Config(precision="fp16"), new_context())
    assert half.files["model.bin"]["size"] < 0.6 * exported.files["model.bin"]["size"]
    assert runtime.parameters(half.path) == runtime.parameters(exported.path)


def test_bfloat16_stands_in_the_file(graph: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(graph, Config(precision="bf16"), new_context())
    assert result.details["precision"] == "bf16"
    model = runtime.library().Core().read_model(result.path / "model.xml")
    assert runtime.precision(model) == "bf16"


def test_a_difference_past_the_tolerance_is_an_error(graph: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(
        StageError, match=r"openvino file answers differently from its parent: by .* \(tolerance 1e-12\)"
    ):
        run(graph, Config(tolerance=1e-12), new_context())


def test_an_operator_that_openvino_does_not_know_is_named(
    graph: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    proto = onnx.load(graph.path / "model.onnx")
    proto.graph.node[-1].op_type, proto.graph.node[-1].domain = "Conjure", "com.microsoft"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    strange = Artifact.from_directory(tmp_path, format="onnx", task=graph.task)
    with pytest.raises(StageError, match="Conjure") as caught:
        run(strange, Config(), new_context())
    assert "fusions: none" in str(caught.value.hint)


def test_a_folder_is_recognised_and_answers(exported: Artifact) -> None:
    (answer,) = optimize.load(exported.path).predict(["a fine film"])
    assert answer["label"] in ("negative", "positive")


def test_sizes_that_are_fixed_are_padded_to(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_source, Config(batch_size=4, sequence_length=16), new_context())
    model = runtime.library().Core().read_model(result.path / "model.xml")
    assert {str(port.partial_shape) for port in model.inputs} == {"[4,16]"}
    assert result.task["max_length"] == 16
    assert result.details["checked_batches"] == [1, 1, 7, 33]


def test_a_graph_has_its_sizes_already(graph: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match="has its sizes already"):
        run(graph, Config(batch_size=4), new_context())


def test_a_graph_that_rounds_as_it_comes_is_warned_of(graph: Artifact, new_context: Callable[..., Context]) -> None:
    from optimize.progress import Progress
    from optimize.quantize import int8_onnxruntime

    class Told(Progress):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, name: str, message: str) -> None:
            self.warnings.append(message)

    told = Told()
    run(graph, Config(), new_context(progress=told))
    assert told.warnings == []
    dynamic = int8_onnxruntime.run(graph, int8_onnxruntime.Config(mode="dynamic"), new_context())
    result = run(dynamic, Config(), new_context(progress=told))
    assert any("quantise with mode: static, or after this stage" in warning for warning in told.warnings)
    assert optimize.Model(result, threads=1).predict(["a fine film"])
