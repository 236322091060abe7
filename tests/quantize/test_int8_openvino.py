"""INT8 for OpenVINO: close to its parent, reproducible, what is ignored stays in float, and a budget is kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import runtimes, tasks
from optimize.artifact import Artifact
from optimize.calibration import Calibration
from optimize.context import Context
from optimize.data import Data, prepare
from optimize.errors import StageError
from optimize.progress import Progress
from optimize.quantize import int8_openvino
from optimize.quantize.int8_openvino import Config, run
from optimize.runtimes import openvino as runtime
from optimize.work import Work


class Told(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)


FEW = Calibration(num_samples=16, batch_size=4)
LAYER = "bert.encoder.layer.0.attention.self.query/MatMul"


@pytest.fixture(scope="module")
def rows(pico_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    task = tasks.get("text-classification")
    splits = {"train": 0.3, "validation": 0.2, "calibration": 0.2, "evaluation": 0.3}
    config = task.Data(source=str(pico_csv), splits=splits)
    return prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_csv.parent).for_stages()


@pytest.fixture
def context(rows: Data, new_context: Callable[..., Context]) -> Context:
    return new_context(data=rows)


@pytest.fixture(scope="module")
def told() -> Told:
    """What was said while `quantized` was made."""
    return Told()


@pytest.fixture(scope="module")
def quantized(pico_openvino: Artifact, rows: Data, new_context: Callable[..., Context], told: Told) -> Artifact:
    return run(pico_openvino, Config(calibration=FEW), new_context(data=rows, progress=told))


def logits(artifact: Artifact, context: Context) -> np.ndarray:
    tokenizer = context.task.preprocessor(artifact.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), artifact.task)
    inputs = context.task.collate(tokenizer, features)
    return context.task.read_outputs(runtimes.open_artifact(artifact, 1).run(inputs), inputs)


def kinds(artifact: Artifact) -> dict[str, str]:
    """Element types of the constants that layers multiply with, by the layers' names."""
    from optimize.quantize import openvino_graphs

    model = runtime.library().Core().read_model(artifact.path / "model.xml")
    found = {}
    for name, layer in openvino_graphs.layers(model).items():
        for port in (0, 1):
            weight = openvino_graphs.weight(layer.input_value(port))
            if weight is not None and len(weight.shape) > 1:
                found[name] = weight.get_element_type().get_type_name()
    return found


def test_it_is_small_and_answers_like_its_parent(
    quantized: Artifact, pico_openvino: Artifact, context: Context
) -> None:
    assert set(kinds(quantized).values()) == {"i8"}
    assert quantized.details["mode"] == "static"
    assert quantized.details["quantized"]["MatMul"] >= 14  # two layers of six matrices, the pooler and the classifier
    assert quantized.details["ignored"] == []
    assert quantized.files["model.bin"]["size"] < 0.5 * pico_openvino.files["model.bin"]["size"]
    assert set(quantized.files) == set(pico_openvino.files)
    assert quantized.task == pico_openvino.task
    expected = logits(pico_openvino, context)
    assert np.abs(logits(quantized, context) - expected).max() < 0.15 * np.abs(expected).max()
    assert runtime.parameters(quantized.path) == pytest.approx(runtime.parameters(pico_openvino.path), rel=0.02)


def test_the_bytes_are_the_same_again_and_hold_no_path(
    quantized: Artifact, pico_openvino: Artifact, context: Context
) -> None:
    assert run(pico_openvino, Config(calibration=FEW), context).digest == quantized.digest
    assert str(quantized.path.parent) not in (quantized.path / "model.xml").read_text()


def test_a_fresh_process_writes_the_same_bytes_and_prints_nothing(
    quantized: Artifact, pico_openvino: Artifact, pico_csv: Path, tmp_path: Path
) -> None:
    code = f"""
from pathlib import Path
from optimize import tasks
from optimize.artifact import Artifact
from optimize.calibration import Calibration
from optimize.context import Context
from optimize.data import prepare
from optimize.quantize.int8_openvino import Config, run
from optimize.work import Work
root = Path({str(tmp_path)!r})
task = tasks.get("text-classification")
splits = {{"train": 0.3, "validation": 0.2, "calibration": 0.2, "evaluation": 0.3}}
data = prepare(task.Data(source={str(pico_csv)!r}, splits=splits), task, Work(root / "work"), root)
for name in ("artifact", "scratch"):
    (root / name).mkdir()
folder, spec = Path({str(pico_openvino.path)!r}), {dict(pico_openvino.task)!r}
parent = Artifact.from_directory(folder, format="openvino", task=spec)
context = Context(root / "artifact", root / "scratch", task, data, root / "logs")
run(parent, Config(calibration=Calibration(num_samples=16, batch_size=4)), context)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    for name in ("model.xml", "model.bin"):
        assert (tmp_path / "artifact" / name).read_bytes() == (quantized.path / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"smooth_quant": None, "per_channel": False, "calibrate": "percentile"},
        {"sym_activations": True, "calibrate": "mse"},
    ],
)
def test_settings_are_taken(
    pico_openvino: Artifact, quantized: Artifact, context: Context, settings: dict[str, Any]
) -> None:
    result = run(pico_openvino, Config(calibration=FEW, **settings), context)
    assert result.files["model.bin"]["sha256"] != quantized.files["model.bin"]["sha256"]
    expected = logits(pico_openvino, context)
    assert np.abs(logits(result, context) - expected).max() < 0.3 * np.abs(expected).max()


def test_ignored_layers_stay_in_float(pico_openvino: Artifact, quantized: Artifact, context: Context) -> None:
    ignore = ("bert.encoder.layer.0.*", "*word_embeddings*")
    result = run(pico_openvino, Config(ignore=ignore, calibration=FEW), context)
    kept = {name for name, kind in kinds(result).items() if kind == "f32"}
    assert LAYER in kept
    assert any("word_embeddings" in name for name in kept)
    assert kept <= set(result.details["ignored"])
    assert kinds(result)[LAYER.replace("0", "1")] == "i8"


def test_a_budget_keeps_layers_in_float(pico_openvino: Artifact, context: Context, monkeypatch: Any) -> None:
    """The budget chooses; here it is told what to choose, and that layer must answer as it did in float."""
    from optimize.quantize import budget

    seen: list[Any] = []

    def spend(max_drop: float, layers: Any, quantized_without: Any, artifact: Artifact, context: Context) -> Any:
        seen.extend([layers, quantized_without(layers)])
        return budget.Spent(kept=(LAYER,), details={"max_drop": max_drop})

    monkeypatch.setattr(budget, "spend", spend)
    result = run(pico_openvino, Config(max_drop=0.01, calibration=FEW), context)
    assert LAYER in seen[0]
    assert kinds(result)[LAYER] == "f32"
    assert result.details["ignored"] == [LAYER]
    assert result.details["sensitivity"] == {"max_drop": 0.01}
    tokenizer = context.task.preprocessor(pico_openvino.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), pico_openvino.task)
    inputs = context.task.collate(tokenizer, features)
    # With every layer kept it is the float model again, biases and all.
    np.testing.assert_allclose(seen[1].run(inputs)["logits"], logits(pico_openvino, context), atol=1e-5)


def test_a_glob_that_matches_nothing_is_an_error(pico_openvino: Artifact, context: Context) -> None:
    with pytest.raises(StageError, match=r"'decoder\.\*' matches no layer") as caught:
        run(pico_openvino, Config(ignore=("decoder.*",)), context)
    assert "layer names look like 'bert." in str(caught.value.hint)


def test_nothing_quantised_is_an_error(pico_openvino: Artifact, context: Context) -> None:
    with pytest.raises(StageError, match="nothing was quantised"):
        run(pico_openvino, Config(ignore=("*",), calibration=FEW), context)


@pytest.mark.usefixtures("quantized")
def test_a_pair_that_does_not_fuse_is_said(
    pico_openvino: Artifact,
    rows: Data,
    new_context: Callable[..., Context],
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What nncf makes is computed on codes; behind one more pair stands what OpenVINO has in float alone."""
    assert told.warnings == []
    original = int8_openvino._quantize

    def with_a_pair(*given: Any) -> Any:
        from openvino import opset13

        model = original(*given)
        (result,) = model.get_results()
        low, high = np.float32(-1), np.float32(1)
        pair = opset13.fake_quantize(result.input_value(0), low, high, low, high, 256, name="pair")
        result.input(0).replace_source_output(opset13.sin(pair, name="sine").output(0))
        return model

    monkeypatch.setattr(int8_openvino, "_quantize", with_a_pair)
    run(pico_openvino, Config(calibration=FEW), new_context(data=rows, progress=told))
    (warning,) = told.warnings
    told.warnings.clear()
    assert "no integer operator for 1 nodes" in warning
    assert "sine (Math)" in warning
