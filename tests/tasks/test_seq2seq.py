"""Texts made of texts: rows, the search for what is written, ROUGE, and both graphs of an export."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import optimize
from optimize import runtimes, tasks
from optimize.artifact import Artifact
from optimize.beam import Search, write
from optimize.context import Context
from optimize.errors import EvaluationError, OptimizeError, SourceError, StageError
from optimize.evaluate.rouge import longest_common, rouge_l, rouge_n
from optimize.runtimes.seq2seq import ControlTokens, SourceDecoder, control_tokens
from optimize.tasks import written
from optimize.tasks.seq2seq import Summarization, SummarizationData, TextToText
from optimize.work import Work

TASK = Summarization()
SPEC = {
    "name": "summarization",
    "prefix": "",
    "max_length": 24,
    "max_new_tokens": 8,
    "num_beams": 1,
    "length_penalty": 1.0,
}
TEXTS = ["the good film is a story", "a clever plot and", "it is very funny with this actor of the scene", "dull"]
CONTROL = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}


@pytest.fixture(scope="module")
def folder(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of 2 layers and 32 dimensions with random weights."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    path = tmp_path_factory.mktemp("pico") / "t5"
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(T5Config(vocab_size=200, **sizes, **CONTROL)).save_pretrained(path)
    TASK.preprocessor(pico_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def batch(folder: Path) -> dict[str, np.ndarray]:
    tokenizer = TASK.preprocessor(folder)
    return TASK.collate(tokenizer, TASK.encode(tokenizer, TASK.rows_of(TEXTS), SPEC))


# Rows


def test_columns_are_mapped_and_the_target_is_no_input() -> None:
    table = pa.table({"article": ["a", "b"], "summary": ["c", "d"]})
    rows, _ = TASK.prepare(table, SummarizationData(source="rows.csv", text="article"))
    assert rows.to_pydict() == {"text": ["a", "b"], "target": ["c", "d"]}
    assert TASK.notes == ("target",)
    assert TASK.spec(SummarizationData(source="rows.csv", max_new_tokens=8, max_length=24), {}) == SPEC
    with pytest.raises(SourceError, match=r"no column 'target' for `data\.target`"):
        TextToText().prepare(table.rename_columns(["text", "summary"]), TextToText.Data(source="rows.csv"))
    with pytest.raises(SourceError, match="no text in column 'summary' of row 2"):
        TASK.prepare(pa.table({"text": ["a", "b"], "summary": ["c", " "]}), SummarizationData(source="rows.csv"))
    with pytest.raises(OptimizeError, match="inputs must be texts"):
        TASK.rows_of([("a", "b")])


def test_a_prefix_is_read_and_labels_are_padded_apart(folder: Path) -> None:
    tokenizer = TASK.preprocessor(folder)
    rows = pa.table({"text": ["film", "the film is good"], "target": ["good " * 20, "dull"]})
    examples = TASK.examples(tokenizer, rows, {**SPEC, "prefix": "story "})
    assert examples[0]["input_ids"] == tokenizer("story film")["input_ids"]
    found = TASK.collate_examples(tokenizer, examples)
    assert found["labels"].shape == (2, SPEC["max_new_tokens"])
    assert found["labels"][1].tolist() == tokenizer("dull")["input_ids"] + [-100] * 5


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, True),
        ({"architectures": ["MarianMTModel"]}, True),
        ({"architectures": ["BertModel"], "model_type": "bert"}, False),
    ],
)
def test_what_can_write_from_a_text(config: dict, trained: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TASK.check_source(tmp_path, SPEC) is trained


def test_what_goes_on_with_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(SourceError, match="LlamaForCausalLM"):
        TASK.check_source(tmp_path, SPEC)


def test_an_encoder_becomes_both_with_its_weights(pico_model: Path) -> None:
    model = TASK.load_model(pico_model, SPEC)
    assert type(model).__name__ == "EncoderDecoderModel"
    weights = dict(model.named_parameters())
    name = "encoder.layer.0.attention.self.query.weight"
    assert (weights[f"encoder.{name}"] == weights[f"decoder.bert.{name}"]).all()
    assert any("crossattention" in name for name in weights)
    tokens = control_tokens(model.config.to_dict(), model.generation_config.to_dict())
    assert tokens == ControlTokens(start=2, ends=frozenset({3}), pad=0)


# The search


class Chain:
    """A `Writer` of texts whose next token depends on the one before: logits [vocabulary, vocabulary]."""

    def __init__(self, logits: np.ndarray, rows: int = 1) -> None:
        self.logits, self.rows = logits, rows
        self.tokens = ControlTokens(start=0, ends=frozenset({1}), pad=None)

    def forward(self, input_ids: np.ndarray) -> np.ndarray:
        assert len(input_ids) == self.rows
        return self.logits[input_ids].astype(np.float32)

    def keep(self, rows: np.ndarray) -> None:
        self.rows = len(rows)


def every_text(logits: np.ndarray, longest: int, penalty: float) -> list[tuple[float, list[int]]]:
    shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = []
    for length in range(1, longest + 1):
        for text in itertools.product(range(len(logits)), repeat=length):
            if 1 in text[:-1] or (text[-1] != 1 and length < longest):
                continue
            likelihood = sum(shares[a, b] for a, b in zip((0, *text), text, strict=False))
            found.append((float(likelihood) / length**penalty, list(text)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(penalty: float) -> None:
    logits = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    (found,) = write(Chain(logits), Search(4, num_beams=64, length_penalty=penalty))
    score, text = every_text(logits, 4, penalty)[0]
    assert found.tokens == text
    assert found.log_likelihood / len(text) ** penalty == pytest.approx(score, rel=1e-5)


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    logits = np.random.default_rng(5).normal(size=(6, 6)).astype(np.float32)
    (found,) = write(Chain(logits), Search(5))
    expected, token = [], 0
    for _ in range(5):
        token = int(logits[token].argmax())
        expected.append(token)
        if token == 1:
            break
    assert found.tokens == expected


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "num_beams": 0}])
def test_a_search_for_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="it is at least 1"):
        Search(**wrong)


@pytest.mark.parametrize("beams", [1, 3])
def test_pytorch_writes_what_generate_does(folder: Path, batch: dict, beams: int) -> None:
    import torch

    runner: Any = runtimes.get("transformers").open(folder, 1)
    ours = write(runner.writer(batch), Search(8, beams))
    theirs = runner.model.generate(
        **{name: torch.from_numpy(array) for name, array in batch.items()},
        max_new_tokens=8,
        num_beams=beams,
        do_sample=False,
        suppress_tokens=[0],
    )
    for text, row in zip(ours, theirs.tolist(), strict=True):
        assert text.tokens == row[1 : 1 + len(text.tokens)]
        assert set(row[1 + len(text.tokens) :]) <= {0}


def test_a_model_that_does_not_say_how_to_begin_is_refused() -> None:
    assert control_tokens({"decoder_start_token_id": 1}, {"decoder_start_token_id": 2}).start == 2
    with pytest.raises(EvaluationError, match="which token the decoder starts with"):
        control_tokens({"eos_token_id": 1}, {})


# ROUGE


@pytest.mark.parametrize(
    ("text", "reference", "one", "two", "longest"),
    [
        ("the cat sat", "the cat sat", 1, 1, 1),
        ("The cat, sat!", "the CAT sat down", 6 / 7, 4 / 5, 6 / 7),
        ("police kill the gunman", "police killed the gunman", 3 / 4, 1 / 3, 3 / 4),
        ("the the the", "the cat", 2 / 5, 0, 2 / 5),
        ("gunman the kill police", "police kill the gunman", 1, 0, 1 / 4),
        ("", "the cat", 0, 0, 0),
        ("word", "other", 0, 0, 0),
    ],
)
def test_rouge_by_hand(text: str, reference: str, one: float, two: float, longest: float) -> None:
    """Lin's own example among them."""
    assert rouge_n(text, reference, 1) == pytest.approx(one)
    assert rouge_n(text, reference, 2) == pytest.approx(two)
    assert rouge_l(text, reference) == pytest.approx(longest)


def test_rouge_is_that_of_the_package_where_it_is_installed() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    generator = np.random.default_rng(0)
    words = np.array(["a", "b", "c", "d1", "E", "f-g", "h."])
    for _ in range(100):
        text, reference = (" ".join(generator.choice(words, size=generator.integers(0, 20))) for _ in range(2))
        expected = {name: score.fmeasure for name, score in scorer.score(reference, text).items()}
        assert rouge_n(text, reference, 1) == pytest.approx(expected["rouge1"])
        assert rouge_n(text, reference, 2) == pytest.approx(expected["rouge2"])
        assert rouge_l(text, reference) == pytest.approx(expected["rougeL"])


def test_longest_common_is_that_of_the_table() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        ours, theirs = (list(map(str, generator.integers(0, 4, size=generator.integers(0, 90)))) for _ in range(2))
        table = np.zeros((len(ours) + 1, len(theirs) + 1), dtype=int)
        for i, j in itertools.product(range(len(ours)), range(len(theirs))):
            same = ours[i] == theirs[j]
            table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
        assert longest_common(ours, theirs) == table[-1, -1]


def test_metrics_are_means_over_rows() -> None:
    outputs = written.records(["the cat", "a señor"], score=np.zeros(2, dtype=np.float32))
    targets = TASK.targets(pa.table({"target": ["the cat sat", "el señor"]}))
    assert TASK.metrics["rouge1"].compute(outputs, targets) == pytest.approx((4 / 5 + 1 / 2) / 2)


# Export


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second half of a text says what is to be written."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(100):
        words = [f"word{i}" for i in generator.choice(150, size=int(generator.integers(2, 12)), replace=False)]
        lines.append(json.dumps({"text": " ".join(words), "summary": " ".join(words[len(words) // 2 :])}))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run(folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Work]:
    recipe = {
        "version": 1,
        "name": "pico-summaries",
        "model": {"source": str(folder), "task": "summarization"},
        "data": {
            "source": str(rows),
            **{"max_length": 24, "max_new_tokens": 8},
            "splits": {"train": 0.5, "validation": 0.2, "evaluation": 0.3},
        },
        "stages": [
            {"distill": "finetune", "epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "threads": 1},
            {"export": "onnx"},
            {"quantize": "int8", "mode": "dynamic", "ignore": ["*lm_head*"]},
        ],
        "baseline": "finetune",
        "evaluate": {"latency": None, "peak_memory": False},
        "gates": [{"metric": "rougeL", "max_drop": 1.0}],
    }
    work = Work(tmp_path_factory.mktemp("seq2seq") / "work")
    return optimize.apply(recipe, work=work), work


def test_a_recipe_runs(run: tuple[Any, Work]) -> None:
    document = run[0].document
    assert document["error"] is None
    trained, exported, quantized = document["artifacts"]
    assert exported["scores"]["fidelity"]["parent"]["flips"] == 0
    assert exported["scores"]["rougeL"] == trained["scores"]["rougeL"]
    assert quantized["size_bytes"] < exported["size_bytes"]
    assert set(run[1].store.open(trained["digest"]).details["validation"]) == {"loss", "rouge1", "rouge2", "rougeL"}


def test_graphs_write_what_their_parent_does_also_after_forgetting(run: tuple[Any, Work], batch: dict) -> None:
    trained, exported, _ = run[0].document["artifacts"]
    ours, theirs = (runtimes.get(one["format"]).open(Path(one["path"]), 1) for one in (exported, trained))
    for beams in (1, 3):
        got, expected = (write(runner.writer(batch), Search(8, beams)) for runner in (ours, theirs))
        assert [text.tokens for text in got] == [text.tokens for text in expected]
    inputs = {**batch, "decoder_input_ids": np.array([[0, 7, 8]] * len(TEXTS))}
    np.testing.assert_allclose(ours.run(inputs)["logits"], theirs.run(inputs)["logits"], atol=1e-4)
    for runner in (ours, theirs):
        decoder = runner.decoder(16)
        assert isinstance(decoder, SourceDecoder)
        first = decoder.forward(np.array([5, 6, 7, 8])).copy()
        second = decoder.forward(np.array([9])).copy()
        assert decoder.length == 5
        decoder.truncate(4)
        np.testing.assert_allclose(decoder.forward(np.array([9])), second, atol=1e-5)
        decoder.truncate(2)  # another source
        shorter = decoder.forward(np.array([7]))
        decoder.truncate(0)
        np.testing.assert_allclose(decoder.forward(np.array([5, 6, 7, 8])), first, atol=1e-5)
        assert not np.allclose(shorter, first)
        with pytest.raises(EvaluationError, match="does not fit in 16"):
            decoder.forward(np.arange(13))


def test_a_folder_answers(run: tuple[Any, Work]) -> None:
    exported = run[0].document["artifacts"][1]
    model = optimize.load(exported["path"])
    (one, other) = model.predict(["word1 word2", "word3"], max_new_tokens=3, num_beams=2)
    assert one["tokens"] <= 3
    assert other["score"] <= 0
    assert isinstance(one["text"], str)
    with pytest.raises(TypeError, match="takes max_new_tokens, num_beams, length_penalty: temperature says nothing"):
        model.predict(["word1"], temperature=1.0)
    with pytest.raises(TypeError, match="ask `predict`"):
        model.stream("word1")


def test_another_decoder_is_noticed(run: tuple[Any, Work]) -> None:
    import torch

    from optimize.export import encoder_decoder

    trained, exported, _ = run[0].document["artifacts"]
    runner: Any = runtimes.get("onnx").open(Path(exported["path"]), 1)
    parent: Any = runtimes.get("transformers").open(Path(trained["path"]), 1)
    batch = {"input_ids": np.array([[5, 6]]), "attention_mask": np.ones((1, 2), dtype=np.int64)}
    assert encoder_decoder._difference(runner, parent, batch, [[7, 8]]) < 1e-5
    with torch.no_grad():
        parent.model.lm_head.weight += 0.1
    assert encoder_decoder._difference(runner, parent, batch, [[7, 8]]) > 1e-3


def test_static_ranges_of_two_graphs_are_refused(run: tuple[Any, Work], new_context: Callable[..., Context]) -> None:
    from optimize.quantize import int8_onnxruntime

    artifact = run[1].store.open(run[0].document["artifacts"][1]["digest"])
    assert isinstance(artifact, Artifact)
    context = new_context()
    with pytest.raises(StageError, match="by mode: dynamic"):
        int8_onnxruntime.run(artifact, int8_onnxruntime.Config(mode="static"), context)
    with pytest.raises(StageError, match=r"`ignore` '\*absent\*' matches no node of encoder.onnx, decoder.onnx"):
        int8_onnxruntime.run(artifact, int8_onnxruntime.Config(ignore=("*absent*",)), context)


def test_both_names_are_the_same_task() -> None:
    assert isinstance(tasks.get("text2text"), TextToText)
    assert isinstance(tasks.get("summarization"), TextToText)
