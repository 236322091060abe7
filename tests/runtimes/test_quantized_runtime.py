"""Libraries of quantised checkpoints: loaded without code from a hub, and without a trace in our process."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from optimize.errors import EvaluationError
from optimize.runtimes import quantized, transformers
from optimize.runtimes.quantized import load_library, serving


def test_a_library_is_loaded_without_code_from_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rude_library.py").write_text(
        "import logging, os\n"
        "print('a banner')\n"
        "os.environ['HF_HOME'] = '/elsewhere'\n"
        "os.environ['RUDE'] = '1'\n"
        "try:\n    import kernels\n    FETCHED = True\nexcept ImportError:\n    FETCHED = False\n"
        "logging.getLogger('rude_library.inner').warning('a warning')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HOME", "/ours")
    kernels = types.ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    library = load_library("rude_library", "rude")
    assert not library.FETCHED
    assert sys.modules["kernels"] is kernels
    assert os.environ["HF_HOME"] == "/ours"
    assert "RUDE" not in os.environ
    assert capsys.readouterr() == ("", "")
    assert not logging.getLogger("rude_library.inner").isEnabledFor(logging.WARNING)


def test_a_missing_library_is_told(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantized.SERVED_BY, "gptq", ("not_there", "gptq"))
    config = json.loads((pico_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(EvaluationError, match="not_there") as caught:
        transformers.open(tmp_path, 1)
    assert caught.value.hint == 'pip install "optimize-workbench[gptq]"'


def test_an_unknown_method_is_told() -> None:
    with (
        pytest.raises(EvaluationError, match="weights quantised by 'magic' can't be opened") as caught,
        serving({"quantization_config": {"quant_method": "magic"}}),
    ):
        pass
    assert "bitsandbytes, gptq" in str(caught.value.hint)


def test_random_numbers_go_on_as_before() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    expected = draw()
    seed()
    with quantized.untouched_randomness():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
    assert draw() == expected


def test_a_model_in_float_needs_nothing() -> None:
    with serving({"architectures": ["LlamaForCausalLM"]}) as settings:
        assert settings == {}
