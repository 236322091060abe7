"""INT8 by torchao: a checkpoint that transformers loads by itself, and that compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import optimize
from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import torch_export
from optimize.quantize.int8_torchao import Config, run
from optimize.runtimes import transformers

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def quantized(pico_source: Artifact, new_context: Callable[..., Context]) -> Artifact:
    return run(pico_source, Config(ignore=("classifier",)), new_context())


def logits(artifact: Artifact) -> np.ndarray:
    ids = np.array([[2, 7, 9, 3], [2, 40, 41, 3]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return runtimes.open_artifact(artifact, threads=1).run(inputs)["logits"]


def test_transformers_loads_it_by_itself(quantized: Artifact, pico_source: Artifact) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(quantized.path, device_map={"": "cpu"})
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.weight.qdata.dtype == torch.int8
    assert type(model.classifier.weight) is torch.nn.Parameter
    exact = transformers.open(pico_source.path, 1).model.bert.encoder.layer[0].attention.self.query.weight
    scale = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.weight.dequantize() - exact).abs() <= scale * 0.51).all()
    assert quantized.details["kept"] == {"classifier": "ignored"}
    assert quantized.details["quantized"] == 13


def test_it_answers_nearly_the_same(quantized: Artifact, pico_source: Artifact) -> None:
    difference = np.abs(logits(quantized) - logits(pico_source)).max()
    assert 0 < difference < 0.05
    assert transformers.parameters(quantized.path) == transformers.parameters(pico_source.path)
    assert optimize.Model(quantized, threads=1).predict(["good"])


def test_the_bytes_are_the_same_again(
    quantized: Artifact, pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    assert run(pico_source, Config(ignore=("classifier",)), new_context()).digest == quantized.digest
    content = (quantized.path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_it_exports_without_a_pickle_and_answers_the_same(
    quantized: Artifact, new_context: Callable[..., Context]
) -> None:
    program = torch_export.run(quantized, torch_export.Config(), new_context())
    np.testing.assert_allclose(logits(program), logits(quantized), atol=1e-5)
    assert runtimes.get("torch_export").parameters(program.path) == transformers.parameters(quantized.path)
    # Where nobody has imported torchao yet.
    opening = "import sys, pathlib, optimize.runtimes.torch_export as r; r.open(pathlib.Path(sys.argv[1]), threads=1)"
    subprocess.run([sys.executable, "-c", opening, str(program.path)], check=True, timeout=120)


def test_a_glob_that_matches_nothing_is_an_error(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match="`ignore` 'decoder' matches no linear layer"):
        run(pico_source, Config(ignore=("decoder",)), new_context())
    with pytest.raises(StageError, match="nothing was quantised"):
        run(pico_source, Config(ignore=("*",)), new_context())


def test_what_is_quantised_already_is_refused(quantized: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match=r"quantised already \(torchao\)"):
        run(quantized, Config(), new_context())


def test_a_cast_model_keeps_its_type(
    pico_source: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    model = transformers.open(pico_source.path, 1).model.bfloat16()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pico_source.path / name).read_bytes())
    cast = Artifact.from_directory(tmp_path, format="transformers", task=pico_source.task)
    result = run(cast, Config(sym=False), new_context())
    assert transformers.open(result.path, 1).model.classifier.bias.dtype == torch.bfloat16
