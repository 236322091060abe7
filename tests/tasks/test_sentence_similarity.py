"""Vectors of sentences: pooling, and how well they tell what belongs together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import spearmanr

from optimize.calibration import Calibration
from optimize.errors import OptimizeError, RecipeError, SourceError
from optimize.evaluate.answers import compare_answers, score_answers
from optimize.evaluate.similarity import RECALL_AT_1, RECALL_AT_5, SPEARMAN, cosines
from optimize.recipe import load
from optimize.runtimes.transformers import TorchRunner
from optimize.tasks.pooling import pooling_of
from optimize.tasks.sentence_similarity import POOLED, SentenceSimilarity, SentenceSimilarityData

TASK = SentenceSimilarity()
SPEC = {"name": "sentence-similarity", "max_length": 16, "pooling": None}
ROWS = pa.table({"text": ["good", "a fine film"], "text_pair": ["the story is very dull", "great"]})
NOTHING = np.empty(0)


@pytest.fixture(scope="module")
def encoder(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model without its head, as sentence-transformers saves one."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("encoder") / "model"
    AutoModel.from_pretrained(pico_model).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pico_model / name, folder / name)
    say(folder, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    return folder


def say(folder: Path, *extra: str, **pooling: object) -> None:
    """Write the files that sentence-transformers keeps its pooling in."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *((kind, f"2_{kind}") for kind in extra)]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))


def test_rows_are_pairs_with_or_without_a_score() -> None:
    table = pa.table({"a": ["x", "y"], "b": ["z", "z"], "s": [5, 1]})
    config = SentenceSimilarityData(source="rows.csv", text="a", text_pair="b", score="s")
    rows, _ = TASK.prepare(table, config)
    assert rows.to_pydict() == {"text": ["x", "y"], "text_pair": ["z", "z"], "label": [5.0, 1.0]}
    assert rows["label"].type == pa.float64()
    assert TASK.targets(rows).tolist() == [5, 1]
    rows, _ = TASK.prepare(table, SentenceSimilarityData(source="rows.csv", text="a", text_pair="b"))
    assert rows.column_names == ["text", "text_pair"]
    assert not len(TASK.targets(rows))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "score": [1.0]}, "no column 'text_pair'"),
        ({"text": ["a", " "], "text_pair": ["b", "b"], "score": [1.0, 2]}, "no text in column 'text' of row 2"),
        ({"text": ["a"], "text_pair": ["b"], "score": ["high"]}, "not numbers"),
        ({"text": ["a", "b"], "text_pair": ["b", "c"], "score": [1, None]}, "no score in column 'score' of row 2"),
    ],
)
def test_rows_that_cant_be_right_are_refused(columns: dict, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        TASK.prepare(pa.table(columns), SentenceSimilarityData(source="rows.csv", score="score"))


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_the_folder_says_how_to_pool(tmp_path: Path, said: dict, mode: str) -> None:
    say(tmp_path, "Normalize", **said)
    assert pooling_of(tmp_path) == mode


@pytest.mark.parametrize(
    ("extra", "said", "message"),
    [
        ((), {"pooling_mode_max_tokens": True}, "pooling by max_tokens can't be done"),
        ((), {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token and mean_tokens"),
        ((), {}, "pooling by nothing"),
        (("Dense",), {"pooling_mode_mean_tokens": True}, "the module Dense can't be taken"),
        (("Pooling",), {"pooling_mode_mean_tokens": True}, "2 modules pool"),
    ],
)
def test_pooling_that_is_not_known_is_refused(tmp_path: Path, extra: tuple, said: dict, message: str) -> None:
    say(tmp_path, *extra, **said)
    with pytest.raises(SourceError, match=message):
        pooling_of(tmp_path)


@pytest.mark.parametrize("content", ["5", "{", '[{"type": "a.Pooling"}]', '[{"type": "a.Pooling", "path": "../x"}]'])
def test_modules_that_make_no_sense_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(SourceError, match=r"makes no sense|outside of its own"):
        pooling_of(tmp_path)


def test_somebody_has_to_say_how_to_pool(pico_model: Path, encoder: Path, tmp_path: Path) -> None:
    assert TASK.check_source(encoder, SPEC)
    with pytest.raises(SourceError, match="it is 'BertForSequenceClassification'"):
        TASK.check_source(pico_model, SPEC)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(SourceError, match="nothing says how tokens are pooled") as caught:
        TASK.check_source(tmp_path, SPEC)
    assert "data.pooling: mean" in str(caught.value.hint)
    assert TASK.check_source(tmp_path, {**SPEC, "pooling": "cls"})


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_inside_the_graph_and_behind_it_the_vectors_are_the_same(encoder: Path, mode: str) -> None:
    spec = {**SPEC, "pooling": mode}
    tokenizer = TASK.preprocessor(encoder)
    inside = TASK.load_model(encoder, spec)
    assert type(inside).__name__ == "BertModel"
    plain = super(type(inside), inside).forward
    ids = tokenizer("a fine film", return_tensors="pt")
    with torch.no_grad():
        tokens = plain(**ids).last_hidden_state[0]
    vector = {"mean": tokens.mean(dim=0), "cls": tokens[0], "last": tokens[-1]}[mode]
    expected = torch.nn.functional.normalize(vector, dim=0).numpy()
    from transformers import BertModel

    behind = TorchRunner(BertModel.from_pretrained(encoder), threads=1)
    for runner in (TorchRunner(inside, threads=1), behind):
        for size in (1, 4):
            outputs = TASK.respond(runner, tokenizer, ROWS, spec, batch_size=size)
            assert outputs.shape == (2, 2, 32)
            np.testing.assert_allclose(outputs[1, 0], expected, atol=1e-6)


def test_the_saved_tokenizer_brings_the_pooling_along(encoder: Path, tmp_path: Path) -> None:
    TASK.preprocessor(encoder).save_pretrained(tmp_path)
    assert TASK.preprocessor(tmp_path).pooling == "mean"
    assert (tmp_path / "1_Pooling" / "config.json").read_bytes() == (encoder / "1_Pooling/config.json").read_bytes()


def test_predictions_are_vectors_or_similarities(encoder: Path) -> None:
    tokenizer, runner = TASK.preprocessor(encoder), TorchRunner(TASK.load_model(encoder, SPEC), threads=1)
    outputs = TASK.respond(runner, tokenizer, TASK.rows_of(["good", "great film"]), SPEC, batch_size=2)
    vectors = [np.array(row["embedding"]) for row in TASK.answers(outputs, SPEC)]
    pairs = TASK.respond(runner, tokenizer, TASK.rows_of([("good", "great film")]), SPEC, batch_size=2)
    (pair,) = TASK.answers(pairs, SPEC)
    assert pair["similarity"] == pytest.approx(vectors[0] @ vectors[1], abs=1e-6)
    assert TASK.fidelity(pairs, pairs) == {
        "n": 1,
        "cosine_distance": pytest.approx(dict.fromkeys(("mean", "median", "p99", "p999", "max"), 0), abs=1e-7),
        "difference": dict.fromkeys(("mean", "median", "p99", "p999", "max"), 0),
    }
    for wrong in ([], ["a", ("b", "c")], [("a", "b", "c")], [3.5], [{"text": 1}]):
        with pytest.raises((OptimizeError, TypeError)):
            TASK.rows_of(wrong)


def test_calibration_and_latency_are_of_the_models_own_inputs(encoder: Path) -> None:
    tokenizer = TASK.preprocessor(encoder)
    features = TASK.calibration(tokenizer, ROWS, encoder, SPEC, Calibration(num_samples=2))
    assert len(features) == 2
    assert POOLED not in features[0]
    inputs = TASK.latency_inputs(tokenizer, ROWS, SPEC, batch_size=3, sequence_length=24)
    assert inputs["input_ids"].shape == (3, 24)


def pairs_of(similarities: list[float]) -> np.ndarray:
    """Pairs of vectors with these cosines, of other lengths than 1."""
    angles = np.arccos(similarities)
    first, second = np.zeros((2, len(similarities), 2))
    first[:, 0] = 3
    second[:, 0], second[:, 1] = 2 * np.cos(angles), 2 * np.sin(angles)
    return np.stack([first, second], axis=1).astype(np.float32)


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=60).astype(float)
    similarities = np.clip(scores / 6 + rng.normal(0, 0.3, size=60), -1, 1)
    outputs = pairs_of(similarities.tolist())
    np.testing.assert_allclose(cosines(outputs), similarities, atol=1e-6)
    assert SPEARMAN.compute(outputs, scores) == pytest.approx(spearmanr(similarities, scores).statistic)
    found = score_answers(SPEARMAN, outputs, scores, 0.9)
    assert found.ci[0] < found.estimate < found.ci[1]
    assert compare_answers(SPEARMAN, outputs, outputs, scores, 0.9).ci == (0, 0)
    assert np.isnan(SPEARMAN.compute(outputs, np.ones(60)))
    with pytest.raises(ValueError, match=r"set data\.score"):
        SPEARMAN.compute(outputs, NOTHING)


def test_recall_counts_who_is_ahead_of_the_right_one() -> None:
    base = np.eye(8, dtype=np.float32)
    queries, texts = base.copy(), base.copy()
    texts[1] = base[0]  # a copy of the first row's text is no mistake of the first row, but row 1's own is not found
    queries[2] = 0.6 * base[2] + 0.8 * base[3]  # nearer to the fourth
    outputs = np.stack([queries, texts], axis=1)
    assert RECALL_AT_1.per_row is not None
    assert RECALL_AT_1.per_row(outputs, NOTHING).tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert RECALL_AT_5.compute(outputs, NOTHING) == 1


def recipe(**data: object) -> dict:
    return {
        "version": 1,
        "name": "pairs",
        "model": {"source": "ORG/model", "task": "sentence-similarity"},
        "data": {"source": "ORG/rows", **data},
        "stages": [{"export": "onnx"}],
    }


def test_a_metric_that_the_rows_do_not_have_is_told_at_validation() -> None:
    assert load({**recipe(score="score"), "gates": [{"metric": "spearman", "max_drop": 0.01}]})
    assert load({**recipe(), "evaluate": {"metrics": ["recall_at_1"]}})
    with pytest.raises(RecipeError, match="`spearman` needs people's scores"):
        load(recipe())
    with pytest.raises(RecipeError, match="`recall_at_5` is of pairs"):
        load({**recipe(score="score"), "gates": [{"metric": "recall_at_5", "max_drop": 0.01}]})
    trained = {**recipe(score="score"), "stages": [{"distill": "finetune"}]}
    with pytest.raises(RecipeError, match="takes no model for sentence-similarity"):
        load(trained)
