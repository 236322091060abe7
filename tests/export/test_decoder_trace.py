"""Architectures of every kind, on 4-bit codes and with a head of 8 bits: ONNX Runtime answers as PyTorch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from optimize.errors import StageError
from optimize.export import decoder, decoder_trace, decoder_weights, nbits, onnx_graph
from optimize.export.onnx import Config
from optimize.quantize.gptq_grid import Grid, round_to_nearest
from optimize.runtimes import onnx as runtime

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2Config": GROUPED,
    "Gemma2Config": {**GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3TextConfig": {
        **{**GROUPED, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8},
        **{"layer_types": ["sliding_attention", "full_attention"]},
    },
    "GPTNeoXConfig": {**SHAPE, "rotary_pct": 0.25},
    "GPT2Config": {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "OPTConfig": {
        **{"vocab_size": 96, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.2},
    },
}
LONG = ("Qwen2Config", "Gemma3TextConfig")
"""Little in these is in none of the others: joined biases; norms of heads, and two kinds of positions."""


def new_model(name: str, settings: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def on_codes(model: Any) -> decoder_weights.Codes:
    """4-bit codes of all layers but the head; the model computes with what they stand for."""
    codes: decoder_weights.Codes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer is not model.get_output_embeddings():
            turned = isinstance(layer, Conv1D)
            quantized = round_to_nearest(layer.weight.T if turned else layer.weight, Grid(4, 32, sym=False))
            codes[name] = nbits.pack(quantized, 4, 32)
            layer.weight.data = quantized.dequantize().T if turned else quantized.dequantize()
    return codes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in ARCHITECTURES]
)
def test_it_answers_as_in_torch(name: str, tmp_path: Path) -> None:
    model = new_model(name, ARCHITECTURES[name])
    in_float = name == "OPTConfig"
    codes = {} if in_float else on_codes(model)
    head = decoder._quantize_head(model, Config(lm_head="none" if in_float else "int8"))
    windows = [np.random.default_rng(0).integers(0, 96, length) for length in (40, 5, 13)]
    expected = [decoder._answer(model, window) for window in windows]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    graph = decoder_trace.trace(model, codes, head, dict.fromkeys(["", *codes], 1), None)
    counts = onnx_graph.counts(graph)
    assert counts["GroupQueryAttention"] == model.config.num_hidden_layers
    assert ("MatMulNBits" in counts) == (not in_float)
    assert ("GatherBlockQuantized" in counts) == (not in_float and model.config.tie_word_embeddings)
    onnx_graph.save(graph, tmp_path / "model.onnx")
    if in_float:  # the head is the embedding, and lies in the file once
        assert (tmp_path / "model.onnx").stat().st_size < 4 * parameters + 20_000
    for what, got, wanted in decoder._answers(runtime.open(tmp_path, threads=1), windows, expected):
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max(), what


@pytest.mark.parametrize("name", ["Bloom", "Falcon"])
def test_one_that_attends_in_its_own_way_is_refused(name: str) -> None:
    model = new_model(
        f"{name}Config", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    )
    with pytest.raises(StageError, match=f"type {name.lower()} can't be exported: its 1 layers call .* 0 times"):
        decoder_trace.trace(model, {}, None, {"": 1}, None)
