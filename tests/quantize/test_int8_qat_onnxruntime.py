"""Quantisation-aware training: what ships computes on the very codes that were trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import optimize
from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.distill import training
from optimize.errors import StageError
from optimize.quantize.fake_quant import WeightGrid
from optimize.quantize.int8_qat_onnxruntime import Config, run
from optimize.work import Work

SETTINGS: dict[str, Any] = {
    "mode": "qat",
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "threads": 1,
    "device": "cpu",
    "calibration": {"num_samples": 24},
}


@pytest.fixture(scope="module")
def context_of(
    new_context: Callable[..., Context], pico_csv: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Context]:
    task = tasks.get("text-classification")
    splits = {"train": 0.4, "validation": 0.2, "calibration": 0.2, "evaluation": 0.2}
    config = task.Data(source=str(pico_csv), splits=splits)
    data = prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_csv.parent).for_stages()
    return lambda **given: new_context(data=data, **given)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """The fake quantised model and its trained weights, as they were when training ended."""
    return {}


@pytest.fixture(scope="module")
def trained(pico_source: Artifact, context_of: Callable[..., Context], seen: dict[str, Any]) -> Artifact:
    original = training.train

    def watched(model: Any, *args: Any) -> Any:
        result, details = original(model, *args)
        ids = torch.tensor([[2, 7, 9, 3], [2, 40, 41, 3]])
        with torch.inference_mode():
            seen["logits"] = result(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
        seen["weights"] = {name: value.detach().clone() for name, value in result.state_dict().items()}
        return result, details

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", watched)
        return run(pico_source, Config(**SETTINGS), context_of())


def initialisers(artifact: Artifact) -> dict[str, np.ndarray]:
    graph = onnx.load(artifact.path / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_the_codes_in_the_file_are_those_that_were_trained(trained: Artifact, seen: dict[str, Any]) -> None:
    """Every weight, by its bytes: a matrix of codes in the file for each layer of the model, transposed there."""
    codes = [array for array in initialisers(trained).values() if array.dtype == np.int8 and array.ndim == 2]
    expected = []
    for name, weight in seen["weights"].items():
        if weight.dim() == 2 and name.endswith("weight"):
            table = "_embeddings" in name
            grid = WeightGrid(per_channel=not table)
            rounded = torch.round(weight / grid.scale(weight)).to(torch.int8).numpy()
            # The exporter writes a classifier's matrix as it is, and others transposed.
            expected.append(rounded if table or name.startswith(("classifier", "bert.pooler")) else rounded.T)
    found = sorted(array.tobytes() for array in codes)
    assert found == sorted(array.tobytes() for array in expected)
    assert trained.details["quantized"] == {"Gather": 3, "Gemm": 2, "MatMul": 12}


def test_the_scales_in_the_file_are_those_that_were_learnt(trained: Artifact, seen: dict[str, Any]) -> None:
    learnt = {value.item() for name, value in seen["weights"].items() if name.endswith(".scale")}
    assert len(learnt) > 5
    arrays = initialisers(trained).values()
    scalars = {array.item() for array in arrays if array.shape == () and array.dtype == np.float32}
    assert learnt <= scalars


def test_it_answers_like_the_model_that_was_trained(trained: Artifact, seen: dict[str, Any]) -> None:
    ids = np.array([[2, 7, 9, 3], [2, 40, 41, 3]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    runner = optimize.Model(trained, threads=1).runner
    np.testing.assert_allclose(runner.run(inputs)["logits"], seen["logits"], atol=1e-4)
    assert trained.details["max_difference"] < 0.01
    assert 0 <= trained.details["validation"]["accuracy"] <= 1


def test_a_killed_training_goes_on_to_the_same_bytes(
    trained: Artifact, pico_source: Artifact, context_of: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of()
    original = training.check_loss

    class Killed(Exception):
        pass

    def kill(loss: float, when: str) -> None:
        original(loss, when)
        if when == "in training":
            raise Killed

    monkeypatch.setattr(training, "check_loss", kill)
    with pytest.raises(Killed):
        run(pico_source, Config(**SETTINGS, save_steps=3), context)
    monkeypatch.undo()
    assert list(context.scratch.glob("checkpoint-*"))
    again = run(pico_source, Config(**SETTINGS, save_steps=3), replace(context_of(), scratch=context.scratch))
    assert again.digest == trained.digest


def test_what_is_ignored_stays_in_float(pico_source: Artifact, context_of: Callable[..., Context]) -> None:
    config = Config(**{**SETTINGS, "epochs": 0.1}, ignore=("classifier/*", "*embeddings*"), learn_scales=False)
    result = run(pico_source, config, context_of())
    assert result.details["quantized"] == {"Gemm": 1, "MatMul": 12}
    arrays = initialisers(result)
    assert any(array.shape == (2, 32) and array.dtype == np.float32 for array in arrays.values())
    with pytest.raises(StageError, match="nothing can be rounded"):
        run(pico_source, Config(**SETTINGS, ignore=("*",)), context_of())


def test_a_graph_that_answers_differently_is_an_error(
    pico_source: Artifact, context_of: Callable[..., Context]
) -> None:
    with pytest.raises(StageError, match="answers differently from the model that was trained"):
        run(pico_source, Config(**{**SETTINGS, "epochs": 0.1}, tolerance=1e-12), context_of())
