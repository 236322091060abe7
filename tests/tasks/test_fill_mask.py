"""Masks, what models make of them, and their scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.masked import PSEUDO_PERPLEXITY, TOP1, TOP5
from optimize.runtimes.transformers import TorchRunner
from optimize.tasks.fill_mask import HIDDEN, UNKNOWN, FillMask, FillMaskData, no_masks
from optimize.tasks.padding import NO_LABEL

TASK = FillMask()
SPEC = {"name": "fill-mask", "max_length": 16, "mask_probability": 0.3, "mask_seed": 0}
ROWS = pa.table({"text": ["good", "a very fine film with a lovely plot", "the story is dull and cold " * 8]})
NOTHING = np.empty(0)


@pytest.fixture(scope="module")
def runner(pico_model: Path) -> TorchRunner:
    return TorchRunner(TASK.load_model(pico_model, SPEC), threads=1)


def test_rows_are_texts_and_scoring_alone_knows_of_one_by_one() -> None:
    config = FillMaskData(source="rows.csv", text="review", one_by_one=True)
    rows, info = TASK.prepare(pa.table({"review": ["a", "b"], "other": [1, 2]}), config)
    assert rows.to_pydict() == {"text": ["a", "b"]}
    spec = TASK.spec(config, info)
    assert "one_by_one" not in spec
    assert TASK.evaluation_spec(spec, info) == {**spec, "one_by_one": True}
    for columns, message in (({"text": ["a"]}, "no column 'review'"), ({"review": ["a", " "]}, "no text")):
        with pytest.raises(SourceError, match=message):
            TASK.prepare(pa.table(columns), config)


def test_a_rows_masks_depend_on_the_row_and_the_seed_alone(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    features = TASK.encode(tokenizer, ROWS, SPEC)
    assert [row["input_ids"].count(tokenizer.mask_token_id) for row in features] == [1, 2, 4]
    for row in features:
        restored = [
            one if hidden == NO_LABEL else hidden for one, hidden in zip(row["input_ids"], row[HIDDEN], strict=True)
        ]
        text = ROWS["text"][row["row"][0]].as_py()
        assert restored == tokenizer(text, truncation=True, max_length=16)["input_ids"]
    backwards = TASK.encode(tokenizer, ROWS.take([2, 1, 0]), SPEC)
    assert [row[HIDDEN] for row in backwards] == [row[HIDDEN] for row in reversed(features)]
    assert [row[HIDDEN] for row in TASK.encode(tokenizer, ROWS, {**SPEC, "mask_seed": 1})] != [
        row[HIDDEN] for row in features
    ]
    assert [row["labels"] for row in TASK.examples(tokenizer, ROWS, SPEC)] == [row[HIDDEN] for row in features]
    batch = TASK.collate_examples(tokenizer, TASK.examples(tokenizer, ROWS, SPEC))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert set(batch["labels"][0, 3:]) == {NO_LABEL}


def test_scores_are_those_of_the_models_own_loss(pico_model: Path, runner: TorchRunner) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    outputs = TASK.respond(runner, tokenizer, ROWS, SPEC, batch_size=2)
    batch = TASK.collate_examples(tokenizer, TASK.examples(tokenizer, ROWS, SPEC))
    with torch.no_grad():
        answered = runner.model(**{name: torch.from_numpy(array) for name, array in batch.items()})
    assert np.log(PSEUDO_PERPLEXITY.compute(outputs, NOTHING)) == pytest.approx(answered.loss.item(), rel=1e-5)
    masks = batch["labels"] != NO_LABEL
    logits, hidden = answered.logits.numpy()[masks], batch["labels"][masks]
    ranks = (logits > logits[np.arange(len(hidden)), hidden][:, None]).sum(axis=1)
    assert TOP1.compute(outputs, NOTHING) == pytest.approx((ranks < 1).mean())
    assert TOP5.compute(outputs, NOTHING) == pytest.approx((ranks < 5).mean())
    alone = TASK.respond(runner, tokenizer, ROWS, SPEC, batch_size=1)
    assert TASK.incomparable(outputs, alone) is None
    assert TASK.fidelity(outputs, alone)["agreement"] == 1
    assert TASK.fidelity(outputs, alone)["difference"]["max"] < 1e-5
    assert TASK.flips(tokenizer, ROWS, outputs, alone, SPEC) == []
    other = TASK.respond(runner, tokenizer, ROWS, {**SPEC, "mask_seed": 1}, batch_size=2)
    assert "other ones are masked" in str(TASK.incomparable(outputs, other))


def test_one_by_one_scores_every_token_with_all_others_seen(pico_model: Path, runner: TorchRunner) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = ROWS.slice(0, 2)
    outputs = TASK.respond(runner, tokenizer, rows, {**SPEC, "one_by_one": True}, batch_size=4)
    expected = []
    for text in rows["text"].to_pylist():
        ids = tokenizer(text)["input_ids"]
        for place in range(1, len(ids) - 1):
            masked = torch.tensor([ids])
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                expected.append(runner.model(masked).logits[0, place].log_softmax(-1)[ids[place]].item())
    known = outputs["masks"]["token"] >= 0
    np.testing.assert_allclose(outputs["masks"]["log_likelihood"][known], expected, rtol=1e-4)
    assert PSEUDO_PERPLEXITY.compute(outputs, NOTHING) == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)


def test_flips_show_what_was_hidden(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    ids = tokenizer.convert_tokens_to_ids(["good", "bad", "film"])
    before = np.zeros(1, dtype=[("masks", no_masks(0).dtype, (2,)), ("text", "S1")])
    before["masks"] = no_masks(1, 2)
    before["masks"]["token"][0, 0], before["masks"]["top"][0, 0, 0] = ids[0], ids[1]
    after = before.copy()
    after["masks"]["top"][0, :, 0] = ids[2]
    (flip,) = TASK.flips(tokenizer, pa.table({"text": ["a good film"]}), after, before, SPEC)
    assert flip == {"row": 0, "text": "a good film", "hidden": ["good"], "baseline": ["bad"], "candidate": ["film"]}


def test_predictions_fill_the_masks(pico_model: Path, runner: TorchRunner) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = TASK.rows_of(["a [MASK] film", {"text": "the [MASK] is [MASK]"}])
    two, one = (TASK.answers(TASK.respond(runner, tokenizer, rows, SPEC, batch_size=n), SPEC) for n in (2, 1))
    assert [len(row["fills"]) for row in two] == [1, 2]
    for row, other in zip(two, one, strict=True):
        assert row["text"] == other["text"]
        assert all(len(fill) == 5 for fill in row["fills"])
        assert all(fill[0]["token"] in row["text"] for fill in row["fills"])
        scores = [token["score"] for token in row["fills"][0]]
        assert scores == sorted(scores, reverse=True)
    assert two[0]["text"] == f"a {two[0]['fills'][0][0]['token']} film"
    with pytest.raises(OptimizeError, match="nothing to fill in: 'a film'"):
        TASK.encode(tokenizer, TASK.rows_of(["a film"]), SPEC)
    with pytest.raises(OptimizeError, match="inputs must be texts"):
        TASK.rows_of([("a", "b")])


def test_what_cant_be_foretold_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no mask token"):
        TASK.preprocessor(pico_llama)
    inputs = {HIDDEN: np.array([[NO_LABEL, 9]])}
    with pytest.raises(EvaluationError, match="token 9, and the model knows 9 only"):
        TASK.read_outputs({"logits": np.zeros((1, 2, 9), dtype=np.float32)}, inputs)
    with pytest.raises(EvaluationError, match="no `logits`, but 'hidden'"):
        TASK.read_outputs({"hidden": np.zeros(1)}, inputs)
    assert TASK.read_outputs({"logits": np.zeros((1, 2, 9))}, {HIDDEN: np.array([[NO_LABEL, UNKNOWN]])}).shape == (1, 1)
    for name, trained in (("BertForMaskedLM", True), ("BertModel", False)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert TASK.check_source(tmp_path, SPEC) is trained


def test_calibration_and_latency_are_of_the_models_own_inputs(pico_model: Path) -> None:
    from optimize.calibration import Calibration

    tokenizer = TASK.preprocessor(pico_model)
    features = TASK.calibration(tokenizer, ROWS, pico_model, SPEC, Calibration(num_samples=2))
    assert {name for row in features for name in row} == {"input_ids", "attention_mask"}
    inputs = TASK.latency_inputs(tokenizer, ROWS, SPEC, batch_size=2, sequence_length=24)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (2, 24)
