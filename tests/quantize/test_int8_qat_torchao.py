"""Quantisation-aware training for torchao: what ships has the very codes that were trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optimize
from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.distill import training
from optimize.errors import StageError
from optimize.quantize import int8_torchao
from optimize.quantize.int8_qat_torchao import Config, run
from optimize.recipe import load
from optimize.runtimes import transformers

pytest.importorskip("torchao")

SETTINGS: dict[str, Any] = {
    "mode": "qat",
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "threads": 1,
    "device": "cpu",
}
IDS = np.array([[2, 7, 9, 3], [2, 40, 41, 3]])
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
LAYER = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """The fake quantised model's answers and its weights, as they were when training ended."""
    return {}


@pytest.fixture(scope="module")
def trained(pico_source: Artifact, new_context: Callable[..., Context], seen: dict[str, Any]) -> Artifact:
    original = training.train

    def watched(model: Any, *args: Any) -> Any:
        result, details = original(model, *args)
        with torch.inference_mode():
            seen["logits"] = result(**{name: torch.from_numpy(array) for name, array in INPUTS.items()}).logits.numpy()
        seen["kinds"] = {type(module).__name__ for module in result.modules()}
        seen["weights"] = {name: value.detach().clone() for name, value in result.state_dict().items()}
        return result, details

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", watched)
        return run(pico_source, Config(**SETTINGS, ignore=("classifier",)), new_context())


def logits(artifact: Artifact) -> np.ndarray:
    return runtimes.open_artifact(artifact, threads=1).run(INPUTS)["logits"]


def test_the_codes_in_the_file_are_those_that_were_trained(trained: Artifact, seen: dict[str, Any]) -> None:
    """By the definition of the grid: 255 steps between the largest weight of a row and its negative."""
    assert "FakeQuantizedLinear" in seen["kinds"]
    model = transformers.open(trained.path, 1).model
    rounded = 0
    for name, module in model.named_modules():
        if not hasattr(getattr(module, "weight", None), "qdata"):
            continue
        weight = seen["weights"][f"{name}.weight"]
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
        codes = torch.round(weight * (1.0 / scale)).clamp(-128, 127).to(torch.int8)
        assert torch.equal(module.weight.qdata, codes)
        assert torch.equal(module.weight.scale, scale)
        rounded += 1
    assert rounded == trained.details["quantized"] == 13
    assert trained.details["kept"] == {"classifier": "ignored"}
    assert torch.equal(model.classifier.weight, seen["weights"]["classifier.weight"])


def test_it_answers_like_the_model_that_was_trained(
    trained: Artifact, pico_source: Artifact, seen: dict[str, Any]
) -> None:
    """And not like one that has the same weights in float."""
    model = transformers.open(pico_source.path, 1).model
    before = model.state_dict()[f"{LAYER}.weight"].clone()
    assert not torch.equal(seen["weights"][f"{LAYER}.weight"], before)
    model.load_state_dict(seen["weights"])
    exact = transformers.TorchRunner(model, threads=1).run(INPUTS)["logits"]
    shipped, floats = (np.abs(answers - seen["logits"]).max() for answers in (logits(trained), exact))
    assert shipped < floats / 10
    assert trained.details["max_difference"] < 0.01
    assert 0 <= trained.details["validation"]["accuracy"] <= 1
    assert optimize.Model(trained, threads=1).predict(["good"])


def test_a_killed_training_goes_on_to_the_same_bytes(
    trained: Artifact, pico_source: Artifact, new_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context()
    original = training.check_loss

    class Killed(Exception):
        pass

    def kill(loss: float, when: str) -> None:
        original(loss, when)
        if when == "in training":
            raise Killed

    config = Config(**SETTINGS, ignore=("classifier",), save_steps=3)
    monkeypatch.setattr(training, "check_loss", kill)
    with pytest.raises(Killed):
        run(pico_source, config, context)
    monkeypatch.undo()
    assert list(context.scratch.glob("checkpoint-*"))
    again = run(pico_source, config, replace(new_context(), scratch=context.scratch))
    assert again.digest == trained.digest


@pytest.mark.parametrize("settings", [{"sym": False}, {"reduce_range": True}])
def test_other_grids_are_trained_as_they_ship(
    pico_source: Artifact, new_context: Callable[..., Context], settings: dict[str, bool]
) -> None:
    result = run(pico_source, Config(**{**SETTINGS, "epochs": 0.1}, **settings), new_context())
    assert result.details["max_difference"] < 0.01
    largest = 64 if settings.get("reduce_range") else 128
    codes = transformers.open(result.path, 1).model.get_submodule(LAYER).weight.qdata.int()
    assert largest / 2 < codes.abs().max() <= largest


def test_a_checkpoint_that_answers_differently_is_an_error(
    pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    with pytest.raises(StageError, match="answers differently from the model that was trained"):
        run(pico_source, Config(**{**SETTINGS, "epochs": 0.1}, tolerance=1e-12), new_context())


def test_what_is_quantised_already_is_refused(trained: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match=r"quantised already \(torchao\)"):
        run(trained, Config(**SETTINGS), new_context())


def test_the_mode_chooses_the_file(pico_recipe: dict[str, Any], tmp_path: Path) -> None:
    def chosen(**said: str) -> str:
        recipe = {**pico_recipe, "stages": [{"quantize": "int8", "name": "rounded", **said}], "baseline": "source"}
        return load(recipe).stages[0].entry.module

    assert chosen(backend="torchao") == int8_torchao.__name__
    assert chosen(backend="torchao", mode="dynamic") == int8_torchao.__name__
    assert chosen(backend="torchao", mode="qat") == run.__module__
    assert chosen(backend="onnxruntime", mode="qat") == "optimize.quantize.int8_qat_onnxruntime"
    with pytest.raises(optimize.RecipeError) as caught:
        chosen(mode="qat")
    assert "choose one: `backend: torchao`, `backend: onnxruntime`" in str(caught.value)
    with pytest.raises(optimize.RecipeError) as caught:
        chosen()
    assert "choose one: `backend: bitsandbytes`, `backend: torchao`" in str(caught.value)
