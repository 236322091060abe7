"""Pico models whose layers differ in what they can bear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

CALIBRATION = {"num_samples": 16, "max_length": 32, "batch_size": 8}
QUICK: dict[str, Any] = {"device": "cpu", "threads": 1, "compute_dtype": "float32", "calibration": CALIBRATION}


@pytest.fixture(scope="session")
def llama(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama, 3 layers deep; of the second one the weights that write hidden states are almost 0."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sensitivity") / "llama"
    config = LlamaConfig.from_pretrained(pico_llama, num_hidden_layers=3, architectures=None, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            layer.weight *= 1e-3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def language(llama: Path, pico_corpus: Path) -> dict[str, Any]:
    """A recipe that quantises it."""
    return {
        "version": 1,
        "name": "pico-mixed",
        "model": {"source": str(llama), "task": "causal-lm"},
        "data": {
            "source": str(pico_corpus),
            "splits": {"calibration": 0.7, "evaluation": 0.3},
            "context_length": 32,
        },
        "stages": [{"quantize": "gptq", "bits": 4, "group_size": 32, **QUICK}],
        "evaluate": {"latency": None, "peak_memory": False},
        "gates": [{"metric": "size", "max_ratio": 2}],
    }
