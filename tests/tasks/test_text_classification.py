"""Rows, labels and inputs of text classification."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from optimize.errors import EvaluationError, OptimizeError, RecipeError, SourceError
from optimize.evaluate.metrics import ACCURACY, MACRO_F1, MATTHEWS, load_metric
from optimize.tasks.text_classification import TextClassification, TextClassificationData

TASK = TextClassification()
SPEC = {"name": "text-classification", "max_length": 16, "labels": ["negative", "positive"]}


def prepare(columns: dict[str, list], **config: object) -> tuple[pa.Table, list[str]]:
    rows, info = TASK.prepare(pa.table(columns), TextClassificationData(source="rows.csv", **config))
    return rows, info["labels"]


def test_label_names_are_sorted_and_become_indices() -> None:
    rows, labels = prepare({"text": ["a", "b", "c"], "label": ["pos", "neg", "pos"]})
    assert labels == ["neg", "pos"]
    assert rows.column_names == ["text", "label"]
    assert rows["label"].to_pylist() == [1, 0, 1]
    assert rows["label"].type == pa.int64()


def test_numbers_sort_as_numbers() -> None:
    _, labels = prepare({"text": list("abc"), "label": [10, 9, 1]})
    assert labels == ["1", "9", "10"]


@pytest.mark.parametrize(("values", "names"), [([True, False], ["false", "true"]), ([1.0, 0.0], ["0", "1"])])
def test_truth_values_and_whole_floats_are_labels(values: list, names: list[str]) -> None:
    assert prepare({"text": ["a", "b"], "label": values})[1] == names


def test_labels_of_the_recipe_set_the_order() -> None:
    rows, labels = prepare({"text": list("ab"), "label": ["neg", "pos"]}, labels=["pos", "neg"])
    assert (labels, rows["label"].to_pylist()) == (["pos", "neg"], [1, 0])


def test_a_list_names_numbers_by_their_position() -> None:
    rows, labels = prepare({"text": list("ab"), "label": [1, 0]}, labels=["bad", "good"])
    assert (labels, rows["label"].to_pylist()) == (["bad", "good"], [1, 0])


def test_a_mapping_may_join_values() -> None:
    given = {1: "bad", 2: "bad", 5: "good"}
    rows, labels = prepare({"text": list("abc"), "label": [1, 2, 5]}, labels=given)
    assert (labels, rows["label"].to_pylist()) == (["bad", "good"], [0, 0, 1])


def test_columns_are_mapped_and_pairs_kept() -> None:
    table = {"premise": ["a", "b"], "claim": ["c", "d"], "y": [0, 1], "other": [0, 0]}
    rows, _ = prepare(table, text="premise", text_pair="claim", label="y")
    assert rows.to_pydict() == {"text": ["a", "b"], "text_pair": ["c", "d"], "label": [0, 1]}


def test_class_labels_of_a_datasets_file_keep_their_names() -> None:
    feature = {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}
    table = pa.table({"text": ["a", "b"], "label": [1, 0]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": feature}})}
    )
    rows, info = TASK.prepare(table, TextClassificationData(source="rows.csv"))
    assert info["labels"] == ["neg", "pos"]
    assert rows["label"].to_pylist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"review": ["a"], "label": [0]}, {}, "no column 'text'"),
        ({"text": ["a", None, "c", "  "], "label": [0, 1, 0, 1]}, {}, "no text in column 'text' of rows 2, 4"),
        ({"text": ["a", "b"], "label": ["x", None]}, {}, "no label in column 'label' of row 2"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, {}, "neither a name nor a whole number"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, {}, "one label only"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, {"labels": ["x", "z"]}, "does not have: 'y'"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, {"labels": ["x", "y", "x"]}, "twice"),
        ({"text": [1, 2], "label": ["x", "y"]}, {}, "not text"),
    ],
)
def test_rows_that_cant_be_right_are_refused(columns: dict, config: dict, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        prepare(columns, **config)


def folder(path: Path, **config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


HEAD = {"architectures": ["BertForSequenceClassification"]}


def test_a_model_without_a_head_needs_one(tmp_path: Path) -> None:
    assert not TASK.check_source(folder(tmp_path, architectures=["BertModel"]), SPEC)


def test_a_trained_head_is_taken_where_labels_agree(tmp_path: Path) -> None:
    assert TASK.check_source(folder(tmp_path, **HEAD, id2label={"1": "positive", "0": "negative"}), SPEC)


def test_numbered_labels_agree_with_a_model_that_names_none(tmp_path: Path) -> None:
    assert TASK.check_source(folder(tmp_path, **HEAD), {**SPEC, "labels": ["0", "1"]})


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (
            {"id2label": {"0": "positive", "1": "negative"}},
            r"data.labels in the model's order: \['positive', 'negative'\]",
        ),
        ({"id2label": {"0": "good", "1": "bad"}}, "map the data's values"),
        ({"id2label": {"0": "negative", "1": "positive", "2": "neutral"}}, "map the data's values"),
        ({}, "negative: LABEL_0, positive: LABEL_1"),
    ],
)
def test_labels_that_contradict_the_model_are_refused(tmp_path: Path, config: dict, hint: str) -> None:
    with pytest.raises(SourceError, match="labels that don't match the model") as caught:
        TASK.check_source(folder(tmp_path, **HEAD, **config), SPEC)
    with pytest.raises(AssertionError, match=hint):
        raise AssertionError(caught.value.hint)


def test_a_regression_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="regression"):
        TASK.check_source(folder(tmp_path, **HEAD, problem_type="regression"), SPEC)


@pytest.mark.parametrize(
    "config", [{"architectures": 5}, {"architectures": [5]}, {**HEAD, "id2label": {"a": "b"}}, {**HEAD, "id2label": 5}]
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path, config: dict) -> None:
    with pytest.raises(SourceError, match="makes no sense"):
        TASK.check_source(folder(tmp_path, **config), SPEC)


def test_a_broken_tokenizer_is_refused_and_its_config_may_be_missing(pico_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((pico_model / name).read_bytes())
    assert TASK.preprocessor(tmp_path)("good")["input_ids"] == TASK.preprocessor(pico_model)("good")["input_ids"]
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(SourceError, match="the tokenizer can't be loaded"):
        TASK.preprocessor(tmp_path)


def test_inputs_are_cut_padded_and_sorted(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    features = TASK.encode(tokenizer, TASK.rows_of(["good", "a good film", "film " * 40]), SPEC)
    assert [len(row["input_ids"]) for row in features] == [3, 5, 16]
    batches = list(TASK.batches(tokenizer, features, 2))
    assert [rows for rows, _ in batches] == [[2, 1], [0]]
    inputs = batches[0][1]
    assert inputs["input_ids"].shape == (2, 16)
    assert inputs["attention_mask"].sum(axis=1).tolist() == [16, 5]
    assert set(inputs["input_ids"][1, 5:]) == {tokenizer.pad_token_id}
    assert TASK.collate(tokenizer, features[:2], length=4)["input_ids"].shape == (2, 4)


def test_pairs_are_encoded_together(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = TASK.rows_of([("a film", "a story"), ("good", "bad")])
    ids = [row["input_ids"] for row in TASK.encode(tokenizer, rows, SPEC)]
    assert ids[0] == tokenizer("a film", "a story")["input_ids"]
    assert ids[0].count(tokenizer.sep_token_id) == 2


def test_latency_inputs_are_real_and_never_padding(pico_model: Path) -> None:
    tokenizer = TASK.preprocessor(pico_model)
    rows = TASK.rows_of(["a fine film", "dull"])
    inputs = TASK.latency_inputs(tokenizer, rows, SPEC, batch_size=3, sequence_length=24)
    assert inputs["input_ids"].shape == (3, 24)
    assert inputs["attention_mask"].all()
    assert (inputs["input_ids"][0] == inputs["input_ids"][2]).all()
    with pytest.raises(EvaluationError, match="longer than the model's 64"):
        TASK.latency_inputs(tokenizer, rows, SPEC, batch_size=1, sequence_length=65)


def test_predictions_take_texts_pairs_and_dictionaries() -> None:
    assert TASK.rows_of(["a"]).to_pydict() == {"text": ["a"]}
    assert TASK.rows_of([("a", "b")]).to_pydict() == {"text": ["a"], "text_pair": ["b"]}
    assert TASK.rows_of([{"text": "a"}]).to_pydict() == {"text": ["a"]}
    for wrong in (["a", ("b", "c")], [("a", "b", "c")], [("a", 3)]):
        with pytest.raises(OptimizeError, match="all single texts or all pairs"):
            TASK.rows_of(wrong)


def test_answers_name_the_label_and_its_probability() -> None:
    answers = TASK.answers(np.array([[0.0, 0.0], [1000.0, 0.0]], dtype=np.float32), SPEC)
    assert answers == [{"label": "negative", "score": 0.5}, {"label": "negative", "score": 1.0}]


def test_a_new_head_has_the_labels_and_the_weights_are_float32(pico_model: Path) -> None:
    model = TASK.load_model(pico_model, {**SPEC, "labels": ["negative", "positive"]})
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert not model.training
    assert {str(tensor.dtype) for tensor in model.parameters()} == {"torch.float32"}


def test_pickled_weights_are_refused(pico_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pico_model / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(SourceError, match="can't be loaded"):
        TASK.load_model(tmp_path, SPEC)


def test_neither_the_module_nor_a_named_tokenizer_imports_torch(pico_model: Path, tmp_path: Path) -> None:
    for file in pico_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "BertTokenizer"}))
    code = f"""
import sys, pathlib
from optimize import tasks
task = tasks.get("text-classification")
assert not {{"torch", "transformers", "numpy", "pyarrow"}} & set(sys.modules)
tokenizer = task.preprocessor(pathlib.Path({str(tmp_path)!r}))
rows = task.encode(tokenizer, task.rows_of(["a fine film"]), {{"max_length": 8}})
task.collate(tokenizer, rows)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def logits(answers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


def test_metrics_agree_with_hand_counts() -> None:
    targets = np.array([0, 0, 1, 1, 2, 2])
    outputs = logits([0, 1, 1, 1, 2, 0], 4)
    assert ACCURACY.compute(outputs, targets) == pytest.approx(4 / 6)
    assert ACCURACY.per_row is not None
    assert ACCURACY.per_row(outputs, targets).tolist() == [1, 0, 1, 1, 1, 0]
    # F1 a class: 1/2, 4/5, 2/3; the fourth class never occurs.
    assert MACRO_F1.compute(outputs, targets) == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    # Two classes, 3 true positives, 1 false positive, 2 true negatives, 1 false negative.
    two = logits([1, 1, 1, 1, 0, 0, 0], 2)
    assert MATTHEWS.compute(two, np.array([1, 1, 1, 0, 0, 0, 1])) == pytest.approx(5 / 12)
    assert MATTHEWS.compute(logits([0, 0], 2), np.array([0, 1])) == 0


def test_a_metric_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_metrics.py").write_text(
        "def misses(outputs, targets):\n    return float((outputs.argmax(1) != targets).mean())\n"
        "misses.higher_is_better = False\n"
        "misses.per_row = lambda outputs, targets: (outputs.argmax(1) != targets).astype(float)\n"
        "def plain(outputs, targets):\n    return 1.0\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metric = load_metric("house_metrics:misses")
    assert (metric.name, metric.higher_is_better, metric.kind) == ("house_metrics:misses", False, "rows")
    assert metric.compute(logits([0, 1], 2), np.array([0, 0])) == 0.5
    assert load_metric("house_metrics:plain").kind == "set"
    for name in ("house_metrics:absent", "no_such_module:f", "accurracy", "house_metrics:number"):
        with pytest.raises(RecipeError):
            load_metric(name)
