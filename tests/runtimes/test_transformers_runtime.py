"""The PyTorch runtime answers like the model itself and loads nothing but safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from optimize.errors import EvaluationError, SourceError
from optimize.runtimes import transformers as runtime
from optimize.tasks.text_classification import TextClassification

INPUTS = {
    "input_ids": np.array([[2, 5, 6, 3], [2, 7, 3, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def test_it_answers_like_the_model_and_leaves_the_threads(pico_model: Path) -> None:
    before = torch.get_num_threads()
    session = runtime.open(pico_model, threads=1)
    outputs = session.run({**INPUTS, "unknown": np.zeros(1)})
    model = BertForSequenceClassification.from_pretrained(pico_model).eval()
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in INPUTS.items()}).logits.numpy()
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-6)
    assert outputs["logits"].dtype == np.float32
    assert torch.get_num_threads() == before


def test_inputs_that_dont_fit_are_an_error(pico_model: Path) -> None:
    with pytest.raises(EvaluationError, match="can't take these inputs"):
        runtime.open(pico_model, threads=1).run({"input_ids": np.full((1, 4), 10_000)})


def test_parameters_are_counted_from_the_headers(pico_model: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(pico_model)
    assert runtime.parameters(pico_model) == sum(tensor.numel() for tensor in model.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(EvaluationError, match="no safetensors file"):
        runtime.parameters(tmp_path)


def copied(pico_model: Path, tmp_path: Path, **config: object) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(pico_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.mark.parametrize("name", ["NoSuchModel", "AutoTokenizer", "logging"])
def test_an_unknown_architecture_is_refused(pico_model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(EvaluationError, match="no model class"):
        runtime.open(copied(pico_model, tmp_path, architectures=[name]), threads=1)


def test_a_models_own_code_is_not_run(pico_model: Path, tmp_path: Path) -> None:
    auto_map = {"AutoModelForSequenceClassification": "evil.EvilModel"}
    folder = copied(pico_model, tmp_path, architectures=["EvilModel"], auto_map=auto_map)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(EvaluationError, match="no model class 'EvilModel'"):
        runtime.open(folder, threads=1)
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_not_made_up(pico_model: Path, tmp_path: Path) -> None:
    folder = copied(pico_model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"classifier\.weight are missing"):
        runtime.open(folder, threads=1)
    spec = {"name": "text-classification", "max_length": 16, "labels": ["negative", "positive"]}
    with pytest.raises(SourceError, match=r"classifier\.weight are missing"):
        TextClassification().load_model(folder, spec)


def test_a_damaged_file_is_an_error(pico_model: Path, tmp_path: Path) -> None:
    folder = copied(pico_model, tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(EvaluationError, match="can't be loaded"):
        runtime.open(folder, threads=1)


def test_pickled_weights_are_not_read(pico_model: Path, tmp_path: Path) -> None:
    folder = copied(pico_model, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(BertForSequenceClassification.from_pretrained(pico_model).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EvaluationError, match="can't be loaded"):
        runtime.open(folder, threads=1)


# A sequence that grows


def all_logits(folder: Path, ids: Sequence[int]) -> Any:
    """[length, vocabulary] of one forward over the whole text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def assert_decodes(folder: Path, **close: float) -> None:
    """After a prompt, steps, another prompt and each truncation the logits are those of one forward over all."""
    ids = np.random.default_rng(0).integers(2, 300, size=40)
    expected = all_logits(folder, ids)
    decoder = runtime.open(folder, threads=1).decoder(40)
    for start in (0, 20, 13, 0, 30, 5):  # forwards, backwards, and where it is already
        decoder.truncate(start)
        decoder.forward(ids[decoder.length : start + 1])
        for end in range(decoder.length + 1, min(decoder.length + 4, 40)):
            logits = decoder.forward(ids[end - 1 : end])
            np.testing.assert_allclose(logits, expected[end - 1], **close)
            assert decoder.length == end
        assert logits.dtype == np.float32
        assert logits.shape == (320,)


def test_a_sequence_goes_on_like_the_whole_text(pico_llama: Path) -> None:
    before = torch.get_num_threads()
    assert_decodes(pico_llama, rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == before


def test_a_window_that_forgets_can_be_truncated(tmp_path: Path) -> None:
    """Mistral with a window of 8: what has left the window is read again."""
    config = transformers.MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.1,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    assert_decodes(tmp_path, rtol=1e-4, atol=1e-5)


def test_learned_positions_and_half_precision(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=320, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert_decodes(tmp_path, rtol=0.05, atol=0.05)


def test_a_sequence_has_an_end(pico_llama: Path) -> None:
    decoder = runtime.open(pico_llama, threads=1).decoder(4)
    decoder.forward(np.array([5, 6, 7]))
    with pytest.raises(EvaluationError, match="5 tokens does not fit in 4"):
        decoder.forward(np.array([5, 6]))
    with pytest.raises(EvaluationError, match="can't take these inputs"):
        decoder.forward(np.array([10_000]))


def test_an_encoder_does_not_decode(pico_model: Path) -> None:
    with pytest.raises(EvaluationError, match="BertForSequenceClassification is no decoder"):
        runtime.open(pico_model, threads=1).decoder(8)
