from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from optimize import runtimes
from optimize.calibration import Calibration
from optimize.errors import EvaluationError, SourceError, StageError
from optimize.tasks.causal_lm import CausalLM, CausalLMData

TASK = CausalLM()
SPEC = {"name": "causal-lm", "context_length": 32, "stride": 32, "separator": "\n"}
Edit = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(pico_llama: Path) -> Any:
    return TASK.preprocessor(pico_llama)


@pytest.fixture(scope="module")
def rows(pico_corpus: Path) -> pa.Table:
    return pa.table({"text": pico_corpus.read_text().split("\n")})


@pytest.fixture
def edited(pico_llama: Path, tmp_path: Path) -> Edit:
    """The pico Llama with another config; None takes a key away."""

    def edit(**changes: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(pico_llama, folder)
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return edit


# The data block


def test_the_column_is_taken_and_what_is_missing_is_empty() -> None:
    table = pa.table({"page": ["one", None, "", "two"], "n": [1, 2, 3, 4]})
    prepared, info = TASK.prepare(table, CausalLMData(source="x", text="page", max_windows=3))
    assert prepared.to_pydict() == {"text": ["one", "", "", "two"]}
    assert TASK.evaluation_spec(SPEC, info)["max_windows"] == 3
    with pytest.raises(SourceError, match="no column 'text'"):
        TASK.prepare(table, CausalLMData(source="x"))
    with pytest.raises(SourceError, match="holds int64, not text"):
        TASK.prepare(table, CausalLMData(source="x", text="n"))


def test_the_spec_says_how_artifacts_see_text() -> None:
    config = CausalLMData(source="x", context_length=64, max_windows=3)
    assert TASK.spec(config, {}) == {"name": "causal-lm", "context_length": 64, "stride": 64, "separator": "\n"}
    with pytest.raises(ValidationError, match="stride 65 is longer than context_length 64"):
        CausalLMData(source="x", context_length=64, stride=65)


# Windows


def test_windows_are_the_text_cut_and_nothing_else(tokenizer: Any, rows: pa.Table, pico_corpus: Path) -> None:
    features = TASK.encode(tokenizer, rows, SPEC)
    whole = tokenizer(pico_corpus.read_text())["input_ids"]
    assert [token for row in features for token in row["input_ids"]] == whole
    assert {len(row["input_ids"]) for row in features[:-1]} == {32}
    assert all(row["scored"] == [0, *[1] * 31] for row in features[:-1])
    assert TASK.encode(tokenizer, rows, SPEC) == features
    assert TASK.encode(tokenizer, rows, {**SPEC, "max_windows": 5})[4]["input_ids"] == features[4]["input_ids"]
    assert len(TASK.encode(tokenizer, rows, {**SPEC, "max_windows": 5})) == 5


@pytest.mark.parametrize("stride", [1, 5, 8, 31])
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 40, 75])
def test_overlapping_windows_score_every_token_but_the_first_once(tokenizer: Any, stride: int, tokens: int) -> None:
    text = random.Random(tokens).sample("abcdefghijklmnopqrstuvwxyz" * 4, tokens)
    ids = tokenizer("\n".join(text))["input_ids"]
    rows = pa.table({"text": text})
    features = TASK.encode(tokenizer, rows, {**SPEC, "stride": stride})
    scored = [
        (start * stride + i, row["input_ids"][i])
        for start, row in enumerate(features)
        for i, counts in enumerate(row["scored"])
        if counts
    ]
    assert scored == list(enumerate(ids))[1:]
    assert all(row["scored"][position] for row in features for position in row["sampled"])
    assert len({len(row["sampled"]) for row in features}) <= 1


def test_the_separator_stands_between_rows(tokenizer: Any) -> None:
    rows = pa.table({"text": ["a film", "the plot"]})
    (window,) = TASK.encode(tokenizer, rows, {**SPEC, "separator": "\n\n"})
    assert tokenizer.decode(window["input_ids"]) == "a film\n\nthe plot"


def test_special_tokens_are_the_tokenizers_own(tokenizer: Any, pico_llama: Path, rows: pa.Table) -> None:
    from tokenizers import processors

    beginning = TASK.preprocessor(pico_llama)
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    ours, theirs = TASK.encode(beginning, rows, SPEC), TASK.encode(tokenizer, rows, SPEC)
    assert ours[0]["input_ids"][:3] == [0, *theirs[0]["input_ids"][:2]]
    assert all(row["input_ids"][0] != 0 for row in ours[1:])


def test_no_text_gives_no_window(tokenizer: Any) -> None:
    assert TASK.encode(tokenizer, pa.table({"text": ["", ""]}), {**SPEC, "separator": ""}) == []


def test_a_batch_is_padded_on_the_right(tokenizer: Any, rows: pa.Table) -> None:
    features = TASK.encode(tokenizer, rows, SPEC)
    batch = TASK.collate(tokenizer, [features[0], {**features[1], "input_ids": [5], "attention_mask": [1]}])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["scored"].shape == (2, 32)
    assert batch["attention_mask"].sum(axis=1).tolist() == [32, 1]
    assert batch["input_ids"][1, 0] == 5


def test_batches_keep_logits_small(tokenizer: Any, rows: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    features = TASK.encode(tokenizer, rows, SPEC)
    monkeypatch.setattr("optimize.tasks.causal_lm.BATCH_BYTES", 3 * 32 * len(tokenizer) * 4)
    sizes = [len(numbers) for numbers, _ in TASK.batches(tokenizer, features, 8)]
    assert max(sizes) == 3
    assert sum(sizes) == len(features)


# Outputs


def test_records_are_what_the_model_says(pico_llama: Path, tokenizer: Any, rows: pa.Table) -> None:
    import torch

    model = TASK.load_model(pico_llama, SPEC)
    features = TASK.encode(tokenizer, rows, {**SPEC, "stride": 8, "max_windows": 3})
    features.append({**features[0], "input_ids": features[0]["input_ids"][:9], "attention_mask": [1] * 9})
    features[-1]["scored"] = [0, *[1] * 8, *[0] * 23]
    features[-1]["sampled"] = [8] * len(features[0]["sampled"])
    batch = TASK.collate(tokenizer, features)
    found = TASK.read_outputs(runtimes.get("transformers").open(pico_llama, 1).run(batch), batch)
    for record, row in zip(found, features, strict=True):
        with torch.no_grad():
            shares = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).numpy()
        count = len(row["input_ids"])
        ids = np.array(row["input_ids"])
        expected = np.zeros(32)
        expected[1:count] = shares[np.arange(count - 1), ids[1:]]
        expected *= row["scored"]
        np.testing.assert_allclose(record["log_likelihood"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(record["top"][1:count], shares[:-1].argmax(axis=-1))
        np.testing.assert_array_equal(record["token"][:count], ids)
        np.testing.assert_allclose(record["distribution"], shares[np.array(row["sampled"]) - 1], atol=1e-2)
    scored = found["scored"].sum()
    assert TASK.metrics["perplexity"].compute(found, TASK.targets(rows)) == pytest.approx(
        math.exp(-found["log_likelihood"].sum() / scored)
    )


def test_a_vocabulary_that_is_too_small_is_named(tokenizer: Any, rows: pa.Table) -> None:
    batch = TASK.collate(tokenizer, TASK.encode(tokenizer, rows, {**SPEC, "max_windows": 2}))
    with pytest.raises(EvaluationError, match="knows 100 only"):
        TASK.read_outputs({"logits": np.zeros((2, 32, 100), dtype=np.float32)}, batch)
    with pytest.raises(EvaluationError, match="no `logits`"):
        TASK.read_outputs({"hidden": np.zeros(2)}, batch)


def test_the_worst_windows_are_told_with_their_text(tokenizer: Any, rows: pa.Table) -> None:
    batch = TASK.collate(tokenizer, TASK.encode(tokenizer, rows, {**SPEC, "max_windows": 4}))
    logits = np.random.default_rng(0).standard_normal((4, 32, len(tokenizer))).astype(np.float32)
    before = TASK.read_outputs({"logits": logits}, batch)
    after = before.copy()
    after["log_likelihood"][2, 1:] -= 1
    after["log_likelihood"][1, 1:] -= 2
    after["log_likelihood"][3, 1:] += 1
    told = TASK.flips(tokenizer, rows, after, before, SPEC)
    assert [one["window"] for one in told] == [1, 2]
    assert told[0]["text"] == tokenizer.decode(batch["input_ids"][1])
    assert told[0]["candidate"]["perplexity"] == pytest.approx(told[0]["baseline"]["perplexity"] * math.e**2, rel=1e-5)
    assert told[0]["candidate"]["tokens"] == 31
    assert json.dumps(told)


def test_other_tokens_are_not_compared(tokenizer: Any, rows: pa.Table) -> None:
    batch = TASK.collate(tokenizer, TASK.encode(tokenizer, rows, {**SPEC, "max_windows": 4}))
    logits = np.zeros((4, 32, len(tokenizer)), dtype=np.float32)
    ours = TASK.read_outputs({"logits": logits}, batch)
    other = ours.copy()
    other["token"][0, 3] += 1
    assert TASK.incomparable(ours, ours.copy()) is None
    assert "other tokens" in str(TASK.incomparable(ours, other))
    assert "other tokens" in str(TASK.incomparable(ours, ours[:3]))


# Calibration


def test_calibration_windows_are_whole_seeded_and_apart(tokenizer: Any, rows: pa.Table, pico_llama: Path) -> None:
    def draw(seed: int, number: int = 16) -> list[list[int]]:
        drawn = TASK.calibration(
            tokenizer, rows, pico_llama, SPEC, Calibration(num_samples=number, max_length=64, seed=seed)
        )
        assert all(row["attention_mask"] == [1] * 64 and row.keys() == {"input_ids", "attention_mask"} for row in drawn)
        return [row["input_ids"] for row in drawn]

    assert draw(0) == draw(0) != draw(1)
    assert len(draw(0)) == 16
    everything = draw(0, 10_000)  # far more than there are
    text = "\n".join(rows["text"].to_pylist())
    assert 0.75 < 64 * len(everything) / len(tokenizer(text)["input_ids"]) < 1
    pieces = [tokenizer.decode(window) for window in everything]
    places = sorted((text.index(piece), len(piece)) for piece in pieces)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))


def test_calibration_that_can_not_be(tokenizer: Any, rows: pa.Table, edited: Edit) -> None:
    folder = edited(vocab_size=50)
    with pytest.raises(StageError, match="512 tokens, longer than the model's 256 positions"):
        TASK.calibration(tokenizer, rows, folder, SPEC, Calibration())
    with pytest.raises(StageError, match="and the model knows 50 only"):
        TASK.calibration(tokenizer, rows, folder, SPEC, Calibration(max_length=16, num_samples=4))


# The model


def test_check_source(edited: Edit, pico_llama: Path, pico_model: Path) -> None:
    assert TASK.check_source(pico_llama, SPEC)
    with pytest.raises(SourceError, match="context_length 257 is longer than the model's 256 positions"):
        TASK.check_source(pico_llama, {**SPEC, "context_length": 257})
    with pytest.raises(SourceError, match="foretells no next token: it is 'BertForSequenceClassification'"):
        TASK.check_source(pico_model, SPEC)
    gpt2 = edited(architectures=["GPT2LMHeadModel"], max_position_embeddings=None, n_positions=16)
    with pytest.raises(SourceError, match="the model's 16 positions"):
        TASK.check_source(gpt2, SPEC)
    assert TASK.check_source(gpt2, {**SPEC, "context_length": 16})


def test_a_quantised_checkpoint_is_left_to_its_runtime(edited: Edit) -> None:
    with pytest.raises(SourceError, match=r"quantised already \(gptq\)"):
        TASK.load_model(edited(quantization_config={"quant_method": "gptq"}), SPEC)


def test_latency_inputs_are_real_tokens(tokenizer: Any, rows: pa.Table) -> None:
    batch = TASK.latency_inputs(tokenizer, rows.slice(0, 2), SPEC, batch_size=2, sequence_length=200)
    assert batch["input_ids"].shape == (2, 200)
    assert batch["attention_mask"].all()
    with pytest.raises(EvaluationError, match="no text"):
        TASK.latency_inputs(tokenizer, pa.table({"text": [""]}), SPEC, batch_size=1, sequence_length=4)
