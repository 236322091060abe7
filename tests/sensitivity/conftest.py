"""Pico models whose layers differ in what they can bear, and recipes for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

LANGUAGE = """\
# What a person wrote.
version: 1
name: pico-mixed
model: {source: MODEL, task: causal-lm}
data:
  source: CORPUS
  splits: {calibration: 0.7, evaluation: 0.3}
  context_length: 32
stages:
  - quantize: gptq
    bits: 4          # four bits, they say
    group_size: 32

    # As quick as can be.
    calibration: {num_samples: 16, max_length: 32, batch_size: 8}
    device: cpu
    threads: 1
    compute_dtype: float32
evaluate: {latency: null, peak_memory: false}   # nothing is timed
gates:
  - {metric: size, max_ratio: 2}
"""
CLASSES = """\
version: 1
name: pico-sparse
model: {source: MODEL, task: text-classification}
data:
  source: ROWS
  splits: {train: 0.4, calibration: 0.3, evaluation: 0.3}
stages:
  - {prune: unstructured, importance: IMPORTANCE, sparsity: 0.5, device: cpu, threads: 1, compute_dtype: float32,
     calibration: {num_samples: 16, max_length: 32}}
evaluate: {latency: null, peak_memory: false}
gates:
  - {metric: size, max_ratio: 2}
"""


@pytest.fixture(scope="session")
def llama(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama, 3 layers deep. What the middle one adds to hidden states is almost 0."""
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
def language(llama: Path, pico_corpus: Path, tmp_path: Path) -> Path:
    """A recipe that quantises it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(LANGUAGE.replace("MODEL", str(llama)).replace("CORPUS", str(pico_corpus)))
    return path


@pytest.fixture
def classes(pico_model: Path, pico_csv: Path, tmp_path: Path) -> Path:
    """A recipe that prunes the pico BERT by magnitude."""
    path = tmp_path / "classes.yaml"
    text = CLASSES.replace("MODEL", str(pico_model)).replace("ROWS", str(pico_csv))
    path.write_text(text.replace("IMPORTANCE", "magnitude"))
    return path
