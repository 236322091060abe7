"""Words, tags and entities of token classification."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.answers import compare_answers
from optimize.evaluate.entities import ENTITY_F1, ENTITY_PRECISION, ENTITY_RECALL, TOKEN_ACCURACY, entities
from optimize.runtimes.transformers import TorchRunner
from optimize.tasks.padding import NO_LABEL
from optimize.tasks.token_classification import TokenClassification, TokenClassificationData, first_pieces

TASK = TokenClassification()
LABELS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
SPEC = {"name": "token-classification", "max_length": 16, "labels": LABELS}
NOTHING = np.empty(0)


def prepare(columns: dict[str, list], **config: object) -> tuple[pa.Table, list[str]]:
    rows, info = TASK.prepare(pa.table(columns), TokenClassificationData(source="rows.jsonl", **config))
    return rows, info["labels"]


def rows_of(*rows: str) -> pa.Table:
    """Rows such as "good/B-PER film/O"."""
    pairs = [[word.split("/") for word in row.split()] for row in rows]
    return pa.table(
        {
            "tokens": [[word for word, _ in row] for row in pairs],
            "label": [[LABELS.index(tag) for _, tag in row] for row in pairs],
        }
    )


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O B-LOC", [("PER", 1, 3), ("LOC", 4, 5)]),
        ("I-PER I-PER B-PER", [("PER", 0, 2), ("PER", 2, 3)]),  # IOB1, and IOB2 that began wrongly
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("B-PER E-PER S-PER I-PER", [("PER", 0, 2), ("PER", 2, 3), ("PER", 3, 4)]),  # BIOES
        ("B-PER I-PER L-PER U-LOC O", [("PER", 0, 3), ("LOC", 3, 4)]),  # BILOU
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("B-date-time I-date-time B_PER", [("date-time", 0, 2), ("PER", 2, 3)]),
        ("NN NN DT O", [("NN", 0, 2), ("DT", 2, 3)]),  # no scheme: runs of one label
        ("", []),
    ],
)
def test_entities_are_read_off_any_scheme(tags: str, found: list) -> None:
    assert entities(tags.split()) == found


def test_names_numbers_and_texts_are_tags() -> None:
    rows, labels = prepare({"tokens": [["Ada", "left"]], "tags": [["B-PER", "O"]]})
    assert (labels, rows.to_pydict()) == (["B-PER", "O"], {"tokens": [["Ada", "left"]], "label": [[0, 1]]})
    rows, labels = prepare({"words": ["Ada left", "we"], "tags": ["B-PER O", "O"]}, tokens="words")
    assert rows.to_pydict() == {"tokens": [["Ada", "left"], ["we"]], "label": [[0, 1], [1]]}
    rows, labels = prepare({"tokens": [["Ada", "left"]], "tags": [[1, 0]]}, labels=["O", "B-PER"])
    assert (labels, rows["label"].to_pylist()) == (["O", "B-PER"], [[1, 0]])


@pytest.mark.parametrize("several", [{"_type": "Sequence"}, {"_type": "List"}, None])
def test_class_labels_of_a_datasets_file_keep_their_names(several: dict | None) -> None:
    one = {"_type": "ClassLabel", "names": ["O", "B-PER"]}
    feature = {"tags": {**several, "feature": one} if several else [one]}
    table = pa.table({"tokens": [["Ada", "left"]], "tags": [[1, 0]]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": feature}})}
    )
    rows, info = TASK.prepare(table, TokenClassificationData(source="rows.parquet"))
    assert (info["labels"], rows["label"].to_pylist()) == (["B-PER", "O"], [[0, 1]])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": [["a"]], "tags": [["O"]]}, "no column 'tokens'"),
        ({"tokens": [["a"], [], None], "tags": [["O"]] * 3}, "no words in column 'tokens' of rows 2, 3"),
        ({"tokens": [[1]], "tags": [["O"]]}, "not words"),
        ({"tokens": [["a", "b"], ["c"]], "tags": [["O"], ["X"]]}, "another number of labels than of words"),
        ({"tokens": [["a"], ["b"]], "tags": [["O"], [None]]}, "no label in column 'tags' of row 2"),
        ({"tokens": [["a"]], "tags": [1]}, "one label a row"),
        ({"tokens": [["a"]], "tags": [["O"]]}, "one label only"),
    ],
)
def test_rows_that_cant_be_right_are_refused(columns: dict, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        prepare(columns)


def test_a_word_is_read_off_its_first_piece() -> None:
    assert first_pieces([None, 0, 1, 1, 3, None]) == [1, 2, -1, 4]
    assert first_pieces([None, None]) == []


def test_only_first_pieces_are_trained_on_and_what_is_cut_off_is_not(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = rows_of("good/B-PER film-story/O bad/B-LOC", "film/O " * 20)
    short, long = TASK.examples(tokenizer, rows, SPEC)
    # [CLS] good film - story bad [SEP]: the pico tokenizer splits at punctuation.
    assert short["labels"] == [NO_LABEL, 1, 4, NO_LABEL, NO_LABEL, 0, NO_LABEL]
    assert len(long["input_ids"]) == len(long["labels"]) == 16
    batch = TASK.collate_examples(tokenizer, [short, long])
    assert batch["labels"].shape == (2, 16)
    assert set(batch["labels"][0, 7:]) == {NO_LABEL}
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.fixture(scope="module")
def runner(pico_model: Path) -> TorchRunner:
    return TorchRunner(TASK.load_model(pico_model, SPEC), threads=1)


def test_answers_do_not_depend_on_the_batch(pico_model: Path, runner: TorchRunner) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = rows_of("good/B-PER film/O", "bad/O " * 20, "the/O story/B-LOC of/O film-actor/O")
    alone, together = (TASK.respond(runner, tokenizer, rows, SPEC, batch_size=size) for size in (1, 3))
    assert TASK.incomparable(together, alone) is None
    np.testing.assert_allclose(together["logits"], alone["logits"], atol=1e-5)
    assert (together["tag"] >= 0).sum(axis=1).tolist() == [2, 14, 4]
    assert together["words"][:, 1].tolist() == [2, 20, 4]
    fidelity = TASK.fidelity(together, alone)
    assert (fidelity["n"], fidelity["flips"]) == (20, 0)
    assert TASK.flips(tokenizer, rows, together, alone, SPEC) == []


def answered(rows: pa.Table, tags: list[list[str]]) -> np.ndarray:
    """Records of a model that gives these tags; a shorter list has been cut off."""
    features = [{"first": list(range(len(row)))} for row in tags]
    outputs = [np.eye(len(LABELS), dtype=np.float32)[[LABELS.index(tag) for tag in row]] for row in tags]
    return TASK.combine(outputs, features, rows, SPEC)


def test_scores_are_those_of_exact_spans() -> None:
    rows = rows_of("a/B-PER b/I-PER c/O d/B-LOC", "e/B-LOC f/O g/O", "h/O i/B-PER")
    outputs = answered(rows, [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC", "O"], ["O"]])
    # Of four entities one is found exactly; one has another type, one is too long, one was not seen.
    assert outputs["entities"].tolist() == [[1, 2, 2], [0, 1, 1], [0, 0, 1]]
    assert outputs["words"].tolist() == [[3, 4], [2, 3], [1, 2]]
    assert ENTITY_PRECISION.compute(outputs, NOTHING) == pytest.approx(1 / 3)
    assert ENTITY_RECALL.compute(outputs, NOTHING) == pytest.approx(1 / 4)
    assert ENTITY_F1.compute(outputs, NOTHING) == pytest.approx(2 / 7)
    assert TOKEN_ACCURACY.compute(outputs, NOTHING) == pytest.approx(6 / 9)
    nothing = rows_of("a/O")
    assert ENTITY_F1.compute(answered(nothing, [["O"]]), NOTHING) == 0


def test_a_comparison_is_paired() -> None:
    rows = rows_of(*["a/B-PER b/O"] * 40)
    right, half = answered(rows, [["B-PER", "O"]] * 40), answered(rows, [["B-PER", "O"], ["O", "O"]] * 20)
    found = compare_answers(ENTITY_F1, half, right, NOTHING, 0.9)
    assert found.estimate == pytest.approx(2 / 3 - 1)
    assert found.ci[0] < found.estimate < found.ci[1] < 0
    assert compare_answers(ENTITY_F1, right, right, NOTHING, 0.9).ci == (0, 0)


def test_flips_show_the_words_and_both_answers(pico_model: Path) -> None:
    rows = rows_of("a/B-PER b/O", "c/O d/O")
    before, after = answered(rows, [["B-PER", "O"], ["O", "O"]]), answered(rows, [["O", "O"], ["O", "O"]])
    assert TASK.flips(None, rows, after, before, SPEC) == [
        {
            "row": 0,
            "tokens": ["a", "b"],
            "tags": ["B-PER", "O"],
            "baseline": ["B-PER", "O"],
            "candidate": ["O", "O"],
        }
    ]
    assert "other words" in str(TASK.incomparable(answered(rows, [["O"], ["O", "O"]]), before))


def test_predictions_name_the_entities(pico_model: Path, runner: TorchRunner) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = TASK.rows_of(["Ada King, of London.", ["one", "two"], {"tokens": ["three"]}])
    assert rows["tokens"].to_pylist()[0] == ["Ada", "King", ",", "of", "London", "."]
    found = TASK.answers(TASK.respond(runner, tokenizer, rows, SPEC, batch_size=2), SPEC)
    assert [len(row["tags"]) for row in found] == [6, 2, 1]
    rows = rows_of("Ada/O King/O of/O London/O")
    (answer,) = TASK.answers(answered(rows, [["B-PER", "I-PER", "O", "B-LOC"]]), SPEC)
    assert [(one["label"], one["text"], one["start"], one["end"]) for one in answer["entities"]] == [
        ("PER", "Ada King", 0, 2),
        ("LOC", "London", 3, 4),
    ]
    assert answer["entities"][0]["score"] == pytest.approx(np.e / (np.e + 4))
    for wrong in ([3], [[]], [["a", 1]], [{"text": "a"}], [""]):
        with pytest.raises(OptimizeError, match="texts or lists of words"):
            TASK.rows_of(wrong)


def test_latency_inputs_are_exactly_as_long_as_asked_for(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    inputs = TASK.latency_inputs(tokenizer, rows_of("good/O film/O"), SPEC, batch_size=3, sequence_length=24)
    assert inputs["input_ids"].shape == (3, 24)
    assert inputs["attention_mask"].all()
    with pytest.raises(EvaluationError, match="longer than the model's 64"):
        TASK.latency_inputs(tokenizer, rows_of("good/O"), SPEC, batch_size=1, sequence_length=65)


def test_bytes_of_words_begin_with_a_space(pico_llama: Path, tmp_path: Path) -> None:
    tokenizer = TASK.preprocessor(pico_llama)
    rows = pa.table({"tokens": [["good", "film"]]})
    (row,) = TASK.encode(tokenizer, rows, {**SPEC, "max_length": 64})
    assert tokenizer.decode(row["input_ids"]).endswith(" good film")
    tokenizer.save_pretrained(tmp_path)
    assert TASK.encode(TASK.preprocessor(tmp_path), rows, {**SPEC, "max_length": 64}) == [row]


def test_labels_of_a_trained_head_have_to_be_the_datas(tmp_path: Path) -> None:
    config = {"architectures": ["BertForTokenClassification"], "id2label": dict(enumerate(LABELS))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TASK.check_source(tmp_path, SPEC)
    with pytest.raises(SourceError, match="labels that don't match"):
        TASK.check_source(tmp_path, {**SPEC, "labels": ["O", "B-PER"]})
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert not TASK.check_source(tmp_path, SPEC)
