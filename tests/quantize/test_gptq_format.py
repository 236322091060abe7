"""The GPTQ checkpoint: what is packed unpacks to the same, here and in the loader that everybody uses."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from optimize.errors import StageError
from optimize.quantize.gptq_format import (
    load_layer,
    pack,
    quantization_config,
    quantized_layers,
    read_config,
    unpack,
)
from optimize.quantize.gptq_solver import Grid, Quantized, round_to_nearest
from optimize.runtimes.quantized import load_library


def random_layer(bits: int, width: int, outputs: int, group_size: int, seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // group_size)
    return Quantized(
        codes=torch.randint(0, 2**bits, (outputs, width), generator=generator, dtype=torch.uint8),
        scales=torch.randn(outputs, groups, generator=generator).half().float(),
        zeros=torch.randint(1, 2**bits, (outputs, groups), generator=generator, dtype=torch.uint8),
        group_of=(torch.arange(width) // group_size)[torch.randperm(width, generator=generator)].int(),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    width=st.integers(1, 4).map(lambda n: 32 * n),
    outputs=st.integers(1, 4).map(lambda n: 32 * n),
    group_size=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_what_is_packed_unpacks_to_the_same(bits: int, width: int, outputs: int, group_size: int, seed: int) -> None:
    layer = random_layer(bits, width, outputs, group_size, seed)
    tensors = pack(layer, bits)
    groups = layer.scales.shape[1]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (width * bits // 32, outputs)),
        "qzeros": (torch.int32, (groups, outputs * bits // 32)),
        "scales": (torch.float16, (groups, outputs)),
        "g_idx": (torch.int32, (width,)),
    }
    back = unpack(tensors)
    for name in ("codes", "scales", "zeros", "group_of"):
        assert torch.equal(getattr(back, name), getattr(layer, name))
        assert getattr(back, name).dtype == getattr(layer, name).dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_one_stream_of_bits_lowest_first(bits: int) -> None:
    layer = random_layer(bits, 64, 32, 32, seed=1)
    column = pack(layer, bits)["qweight"][:, 5].contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(column, bitorder="little").reshape(64, bits)
    assert np.array_equal(stream @ (1 << np.arange(bits)), layer.codes[5].numpy())
    zeros = pack(layer, bits)["qzeros"][1].numpy().view(np.uint8)
    stream = np.unpackbits(zeros, bitorder="little").reshape(32, bits)
    assert np.array_equal(stream @ (1 << np.arange(bits)) + 1, layer.zeros[:, 1].numpy())


@pytest.mark.parametrize(("outputs", "width"), [(32, 40), (40, 32)])
def test_codes_that_fill_no_whole_words_are_refused(outputs: int, width: int) -> None:
    with pytest.raises(StageError, match="40 codes of 3 bits"):
        pack(random_layer(3, width, outputs, 8, 0), 3)


def test_the_config_says_what_a_loader_must_know() -> None:
    common: dict[str, Any] = {"damp_percent": 0.01, "desc_act": True, "true_sequential": True}
    config = quantization_config(Grid(4, 64, True), static_groups=True, quantized=["a.0.x"], **common)
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "static_groups": True,
        "sym": True,
        "damp_percent": 0.01,
        "true_sequential": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["optimize"]},
    }
    partly = quantization_config(
        Grid(4, 64, True), static_groups=False, quantized=["a.0.x", "a.0.y"], kept=["a.1.x"], **common
    )
    assert partly["desc_act"]
    assert partly["modules_in_block_to_quantize"] == [["a.0.x", "a.0.y"]]
    assert partly["dynamic"] == {r"-:^a\.1\.x$": {}}
    json.dumps(partly)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def checkpoint(folder: Path, grid: Grid, kept: tuple[str, ...] = ()) -> dict[str, Quantized]:
    """A Llama of two blocks of 64 dimensions in GPTQ's format; its quantised layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    names = [name for name, module in model.named_modules() if name.endswith(LINEARS) and isinstance(module, nn.Linear)]
    state, layers = model.state_dict(), {}
    for name in names:
        if name not in kept:
            layers[name] = round_to_nearest(state.pop(f"{name}.weight"), grid)
            state |= {f"{name}.{key}": value for key, value in pack(layers[name], grid.bits).items()}
    description = json.loads(config.to_json_string(use_diff=False))
    description["quantization_config"] = quantization_config(
        grid,
        damp_percent=0.01,
        desc_act=True,
        static_groups=True,
        true_sequential=True,
        quantized=layers,
        kept=kept,
    )
    (folder / "config.json").write_text(json.dumps(description), "utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return layers


def test_layers_are_found_and_read(tmp_path: Path) -> None:
    kept = ("model.layers.1.mlp.up_proj",)
    layers = checkpoint(tmp_path, Grid(3, 32, False), kept)
    assert quantized_layers(tmp_path) == sorted(layers)
    assert len(layers) == 13
    for name, layer in layers.items():
        assert torch.equal(load_layer(tmp_path, name).dequantize(), layer.dequantize())
    assert read_config(tmp_path)["bits"] == 3
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}', "utf-8")
    with pytest.raises(StageError, match="no GPTQ checkpoint"):
        read_config(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs the extra gptq")
@pytest.mark.parametrize(
    "grid",
    [
        Grid(2, 32, False),
        Grid(3, 32, True),
        Grid(3, -1, False),
        Grid(3, 64, True),  # of 96 inputs the last group has 32
        Grid(4, 32, True),
        Grid(4, 32, False),
        Grid(8, 32, False),
    ],
    ids=str,
)
def test_transformers_loads_exactly_our_floats(tmp_path: Path, grid: Grid) -> None:
    from transformers import AutoModelForCausalLM

    load_library("gptqmodel", "gptq")  # left to transformers, its import would change the environment
    kept = "model.layers.0.mlp.up_proj"
    layers = checkpoint(tmp_path, grid, (kept,))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.get_submodule(kept)) is nn.Linear
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # they would compile for half a minute
        for name, layer in layers.items():
            theirs = model.get_submodule(name).dequantize_weight().T  # type: ignore[operator]
            # They multiply in float16, where a product is rounded once, as ours is here.
            assert torch.equal(theirs, layer.dequantize().to(theirs.dtype))
        assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
