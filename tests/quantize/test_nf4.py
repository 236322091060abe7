"""NF4 and FP4: what bitsandbytes itself would hold, in a plain checkpoint that answers through the runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize.nf4 import Config, run

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = {"input_ids": np.arange(2, 26, dtype=np.int64)[None]}


@pytest.fixture(scope="module")
def llama(pico_llama: Path) -> Artifact:
    return Artifact.from_directory(pico_llama, format="transformers", task={"name": "causal-lm"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(artifact: Artifact) -> np.ndarray:
    return runtimes.open_artifact(artifact, 1).run(IDS)["logits"]


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 32},
        {"block_size": 32, "data_type": "fp4", "double_quant": False},
        {"block_size": 32, "compute_dtype": "float32"},
    ],
)
def test_it_holds_what_bitsandbytes_would(
    llama: Artifact, new_context: Callable[..., Context], settings: dict[str, Any]
) -> None:
    config = Config(**settings)
    result = run(llama, config, new_context())
    model = AutoModelForCausalLM.from_pretrained(result.path, device_map={"": "cpu"})
    originals = weights(llama.path)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == result.details["quantized"] == 14
    for name, module in layers.items():
        packed, state = bitsandbytes.functional.quantize_4bit(
            originals[f"{name}.weight"],
            blocksize=32,
            compress_statistics=config.double_quant,
            quant_type=config.data_type,
        )
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        held = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(held, expected)
        error = (held - originals[f"{name}.weight"]).norm() / originals[f"{name}.weight"].norm()
        assert result.details["relative_error"]["layers"][name] == pytest.approx(error.item(), rel=0.01)
    assert result.details["kept"] == {"lm_head": "it shares its weight with another layer"}
    expected_logits = logits(llama)
    assert np.abs(logits(result) - expected_logits).max() < 0.5 * np.abs(expected_logits).max()
    assert runtimes.get("transformers").parameters(result.path) == runtimes.get("transformers").parameters(llama.path)


def test_double_quantisation_stores_scales_in_8_bits(llama: Artifact, new_context: Callable[..., Context]) -> None:
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    for double, dtype in ((True, torch.uint8), (False, torch.float32)):
        result = run(llama, Config(double_quant=double, block_size=32), new_context())
        assert weights(result.path)[name].dtype == dtype
    # Two codes a byte, a scale of 4 bytes for 32 of them, and 16 levels and a description for each layer.
    assert 5 < result.details["bits_per_weight"] < 5.5


def test_the_bytes_are_the_same_again_and_hold_no_path(llama: Artifact, new_context: Callable[..., Context]) -> None:
    first, second = (run(llama, Config(block_size=32), new_context()) for _ in range(2))
    assert first.digest == second.digest
    config = (first.path / "config.json").read_text()
    assert str(llama.path) not in config
    assert json.loads(config)["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_shards_stay_shards(llama: Artifact, new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    sharded = Artifact.from_directory(tmp_path, format="transformers", task=llama.task)
    result = run(sharded, Config(block_size=32), new_context())
    assert len(list(result.path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.safetensors"))) > 1
    whole = run(llama, Config(block_size=32), new_context())
    assert np.array_equal(logits(result), logits(whole))


def test_what_the_processors_kernel_cannot_take_stays_in_float(
    pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    context = new_context()
    result = run(pico_source, Config(block_size=32), context)
    assert result.details["quantized"] == 13
    assert result.details["kept"] == {"classifier": "its 2 outputs are no multiple of 32"}
    tokenizer = context.task.preprocessor(result.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), result.task)
    inputs = context.task.collate(tokenizer, features)
    answers = [
        context.task.read_outputs(runtimes.open_artifact(artifact, 1).run(inputs), inputs)
        for artifact in (pico_source, result)
    ]
    assert 0 < np.abs(answers[0] - answers[1]).max() < 0.3 * np.abs(answers[0]).max()
    with pytest.raises(StageError, match="nothing was quantised: its 32 inputs are no multiple of block_size 128"):
        run(pico_source, Config(block_size=128), new_context())


def test_ignored_layers_keep_their_bytes(llama: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(llama, Config(block_size=32, ignore=("model.layers.1.*",)), new_context())
    assert result.details["quantized"] == 7
    before, after = weights(llama.path), weights(result.path)
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert logits(result).shape == (1, 24, 320)
    with pytest.raises(StageError, match=r"'\*\.down' matches no linear layer") as caught:
        run(llama, Config(ignore=("*.down",)), new_context())
    assert "model.layers.0" in str(caught.value.hint)


def test_a_head_of_its_own_is_quantised_when_asked(
    llama: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="shares its weight with the embedding"):
        run(llama, Config(block_size=32, lm_head=True), new_context())
    model = AutoModelForCausalLM.from_pretrained(llama.path, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path)
    untied = Artifact.from_directory(tmp_path, format="transformers", task=llama.task)
    result = run(untied, Config(block_size=32, lm_head=True), new_context())
    assert (result.details["quantized"], result.details["kept"]) == (15, {})
    assert "lm_head.weight.quant_map" in weights(result.path)
    assert logits(result).shape == (1, 24, 320)
    assert run(untied, Config(block_size=32), new_context()).details["kept"] == {"lm_head": "it gives the logits"}


def test_gpt2_whose_files_lack_a_prefix(new_context: Callable[..., Context], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(stripped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Artifact.from_directory(tmp_path, format="transformers", task={"name": "causal-lm"})
    result = run(source, Config(), new_context())
    assert result.details["quantized"] == 4
    expected = logits(source)
    assert np.abs(logits(result) - expected).max() < 0.3 * np.abs(expected).max()


def test_quantising_twice_is_refused(llama: Artifact, new_context: Callable[..., Context]) -> None:
    once = run(llama, Config(block_size=32), new_context())
    with pytest.raises(StageError, match=r"quantised already \(bitsandbytes\)"):
        run(once, Config(block_size=32), new_context())


def test_a_weight_that_is_no_number_is_refused(
    llama: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    broken = Artifact.from_directory(tmp_path, format="transformers", task=llama.task)
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj\.weight holds a number that is not finite"):
        run(broken, Config(block_size=32), new_context())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_quantises_like_the_processor(llama: Artifact, new_context: Callable[..., Context]) -> None:
    there = run(llama, Config(block_size=32, device="cuda"), new_context())
    here = run(llama, Config(block_size=32, device="cpu"), new_context())
    assert np.allclose(logits(there), logits(here), atol=1e-2)
