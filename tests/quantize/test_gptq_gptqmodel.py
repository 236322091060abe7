"""The library GPTQModel as a back end: its codes in our checkpoint, and none of its side effects."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from optimize import runtimes, tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.errors import StageError
from optimize.quantize import gptq
from optimize.quantize.gptq_format import load_layer, quantized_layers, read_config
from optimize.quantize.gptq_gptqmodel import Config, run
from optimize.work import Work

# Importing it changes the environment, which is what some tests here are about.
pytestmark = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs the extra gptq")

IDS = {"input_ids": np.arange(2, 26, dtype=np.int64)[None]}
SETTINGS = {"group_size": 32, "calibration": {"num_samples": 8, "max_length": 64, "batch_size": 4}}


@pytest.fixture(scope="module")
def llama(pico_llama: Path) -> Artifact:
    spec = {"name": "causal-lm", "context_length": 64, "stride": 64, "separator": "\n"}
    return Artifact.from_directory(pico_llama, format="transformers", task=spec)


@pytest.fixture(scope="module")
def lm_context(pico_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Context]:
    task = tasks.get("causal-lm")
    config = task.Data(source=str(pico_corpus), splits={"calibration": 0.5, "evaluation": 0.5})
    rows = prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_corpus.parent).for_stages()

    def make() -> Context:
        scratch = tmp_path_factory.mktemp("scratch")
        return Context(tmp_path_factory.mktemp("artifact"), scratch, task, rows, scratch / "logs", stage="gptq")

    return make


@pytest.fixture(scope="module")
def quantized(llama: Artifact, lm_context: Callable[..., Context]) -> Artifact:
    return run(llama, Config(**SETTINGS), lm_context())


def test_the_checkpoint_is_in_our_format_and_answers(quantized: Artifact, llama: Artifact) -> None:
    assert quantized.details["quantized"] == len(quantized_layers(quantized.path)) == 14
    assert set(quantized.details["loss"]) >= {"0.self_attn.q_proj", "1.mlp.down_proj"}
    assert read_config(quantized.path)["group_size"] == 32
    assert set(quantized.files) == {*llama.files, "quantize_config.json"}
    runner = runtimes.open_artifact(quantized, 1)
    model = runner.model  # type: ignore[attr-defined]
    for name in quantized_layers(quantized.path):
        held = model.get_submodule(name).dequantize_weight().T
        assert torch.allclose(held.float(), load_layer(quantized.path, name).dequantize(), atol=1e-3)
    expected = runtimes.open_artifact(llama, 1).run(IDS)["logits"]
    assert np.abs(runner.run(IDS)["logits"] - expected).mean() < 0.5 * np.abs(expected).mean()
    count = runtimes.get("transformers").parameters
    assert count(quantized.path) == count(llama.path)


def test_it_leaves_no_trace(
    llama: Artifact,
    quantized: Artifact,
    lm_context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    again = run(llama, Config(**SETTINGS), lm_context())
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert dict(os.environ) == environment
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""
    assert again.digest == quantized.digest
    for name in ("config.json", "quantize_config.json"):
        assert "/tmp" not in (again.path / name).read_text()


def test_ignored_layers_stay_in_float(llama: Artifact, lm_context: Callable[..., Context]) -> None:
    result = run(llama, Config(**SETTINGS, ignore=("model.layers.1.mlp.*",)), lm_context())
    assert result.details["ignored"] == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert len(quantized_layers(result.path)) == 11
    layer = runtimes.open_artifact(result, 1).model.model.layers[1].mlp.up_proj  # type: ignore[attr-defined]
    assert type(layer) is torch.nn.Linear
    with pytest.raises(StageError, match="matches no linear layer"):
        run(llama, Config(**SETTINGS, ignore=("down",)), lm_context())


def test_what_the_library_cannot_do_is_told(llama: Artifact, lm_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match=r"gptqmodel can't quantise this model: .*group_size"):
        run(llama, Config(**{**SETTINGS, "group_size": 7}), lm_context())


def test_a_gpt2_opens_though_it_would_draw_weights_that_are_packed(
    new_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=64)).eval()
    model.save_pretrained(tmp_path)
    source = Artifact.from_directory(tmp_path, format="transformers", task={"name": "causal-lm"})
    monkeypatch.setattr(gptq, "calibration_batches", lambda *_: [IDS])
    result = gptq.run(source, gptq.Config(group_size=32, device="cpu", threads=1), new_context())
    for name in quantized_layers(result.path):
        model.get_submodule(name).weight.data = load_layer(result.path, name).dequantize().T  # type: ignore[union-attr]
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS["input_ids"])).logits.numpy()
    assert np.allclose(runtimes.open_artifact(result, 1).run(IDS)["logits"], expected, atol=0.01)
