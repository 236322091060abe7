"""LLM.int8(): bitsandbytes' own codes in a plain checkpoint that answers through the runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimize import recipe, runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize.int8_bitsandbytes import Config, run

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = {"input_ids": np.arange(2, 26, dtype=np.int64)[None]}


@pytest.fixture(scope="module")
def llama(pico_llama: Path) -> Artifact:
    return Artifact.from_directory(pico_llama, format="transformers", task={"name": "causal-lm"})


def logits(artifact: Artifact) -> np.ndarray:
    return runtimes.open_artifact(artifact, 1).run(IDS)["logits"]


def test_it_holds_what_bitsandbytes_would(llama: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(llama, Config(ignore=("*.v_proj",)), new_context())
    assert result.details["quantized"] == 12
    assert set(result.details["kept"]) == {"lm_head", *(f"model.layers.{i}.self_attn.v_proj" for i in range(2))}
    before, after = load_file(llama.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(before[f"{name}.weight"].half())
    assert torch.equal(after[f"{name}.weight"], codes)
    assert torch.equal(after[f"{name}.SCB"], scales)
    model = AutoModelForCausalLM.from_pretrained(result.path, device_map={"": "cpu"})
    assert isinstance(model.get_submodule(name), bitsandbytes.nn.Linear8bitLt)
    assert max(result.details["relative_error"]["layers"].values()) < 0.02
    expected = logits(llama)
    assert 0 < np.abs(logits(result) - expected).max() < 0.1 * np.abs(expected).max()
    assert runtimes.get("transformers").parameters(result.path) == runtimes.get("transformers").parameters(llama.path)


def test_the_threshold_reaches_the_layers(llama: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(llama, Config(threshold=0.5), new_context())
    layer = runtimes.open_artifact(result, 1).model.model.layers[0].mlp.up_proj  # type: ignore[attr-defined]
    assert layer.state.threshold == 0.5
    assert not np.array_equal(logits(result), logits(run(llama, Config(threshold=0.0), new_context())))


def test_an_encoder_answers_like_its_parent(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    context = new_context()
    result = run(pico_source, Config(), context)
    assert result.details["quantized"] == 14
    tokenizer = context.task.preprocessor(result.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), result.task)
    inputs = context.task.collate(tokenizer, features)
    answers = [
        context.task.read_outputs(runtimes.open_artifact(artifact, 1).run(inputs), inputs)
        for artifact in (pico_source, result)
    ]
    assert np.abs(answers[0] - answers[1]).max() < 0.1 * np.abs(answers[0]).max()


def test_the_bytes_are_the_same_again(llama: Artifact, new_context: Callable[..., Context]) -> None:
    assert run(llama, Config(), new_context()).digest == run(llama, Config(), new_context()).digest


def test_a_weight_beyond_float16_is_refused(
    llama: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    broken = Artifact.from_directory(tmp_path, format="transformers", task=llama.task)
    with pytest.raises(StageError, match=r"up_proj\.weight holds 1e\+05, and bitsandbytes quantises from float16"):
        run(broken, Config(), new_context())


def test_the_format_chooses_the_back_end(pico_recipe: dict) -> None:
    stage = {"quantize": "int8", "backend": "bitsandbytes", "threshold": 5.0}
    loaded = recipe.load({**pico_recipe, "stages": [stage], "baseline": "source"})
    assert loaded.stages[0].entry.backend == "bitsandbytes"
    assert recipe.load(pico_recipe).stages[-1].entry.backend == "onnxruntime"
