"""Weights in 16 bits: half the file, computed in as they are stored, and never silently out of range."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.progress import Progress
from optimize.quantize.cast import Config, run

IDS = {"input_ids": np.arange(2, 26, dtype=np.int64)[None]}


@pytest.fixture(scope="module")
def llama(pico_llama: Path) -> Artifact:
    return Artifact.from_directory(pico_llama, format="transformers", task={"name": "causal-lm"})


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_the_model_computes_in_what_it_is_stored_in(
    llama: Artifact, new_context: Callable[..., Context], dtype: str, error: float
) -> None:
    result = run(llama, Config(dtype=dtype), new_context())
    before, after = load_file(llama.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name].to(getattr(torch, dtype)))
    assert json.loads((result.path / "config.json").read_text())["dtype"] == dtype
    runner = runtimes.open_artifact(result, 1)
    assert runner.model.dtype == getattr(torch, dtype)  # type: ignore[attr-defined]
    answers, expected = runner.run(IDS)["logits"], runtimes.open_artifact(llama, 1).run(IDS)["logits"]
    assert answers.dtype == np.float32
    assert 0 < np.abs(answers - expected).max() < error * np.abs(expected).max()
    assert result.details == {"dtype": dtype, "tensors": {"cast": len(before), "kept": 0}}
    assert run(llama, Config(dtype=dtype), new_context()).digest == result.digest


def test_a_weight_out_of_range_is_named(llama: Artifact, new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = -7e4
    model.save_pretrained(tmp_path)
    large = Artifact.from_directory(tmp_path, format="transformers", task=llama.task)
    with pytest.raises(StageError, match=r"up_proj\.weight holds 7e\+04, and float16 ends at 6\.55e\+04") as caught:
        run(large, Config(dtype="float16"), new_context())
    assert "bfloat16" in str(caught.value.hint)
    assert run(large, Config(dtype="bfloat16"), new_context()).details["tensors"]["cast"] > 0


def test_nothing_to_do_is_an_error(llama: Artifact, new_context: Callable[..., Context]) -> None:
    once = run(llama, Config(), new_context())
    with pytest.raises(StageError, match="every weight is in bfloat16 already"):
        run(once, Config(), new_context())


@pytest.mark.parametrize(("flags", "warned"), [(["avx2"], True), (["avx512_bf16"], False)])
def test_a_processor_without_the_type_is_told(
    llama: Artifact,
    new_context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    warned: bool,
) -> None:
    told: list[str] = []

    class Listener(Progress):
        def warn(self, name: str, message: str) -> None:
            told.append(message)

    monkeypatch.setattr("optimize.evaluate.host.fingerprint", lambda: {"cpu": {"flags": flags}})
    run(llama, Config(), new_context(progress=Listener()))
    assert any("answers come slower" in message for message in told) is warned
