"""Questions, windows of long contexts, and the span that answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import optimize
from optimize import runtimes
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.squad import EXACT_MATCH, F1, best, exact_match, f1, normalise
from optimize.tasks import written
from optimize.tasks.question_answering import QuestionAnswering, QuestionAnsweringData, likeliest_span
from optimize.work import Work

TASK = QuestionAnswering()
SPEC = {
    "name": "question-answering",
    "max_length": 24,
    "stride": 6,
    "max_question_length": 8,
    "max_answer_length": 5,
    "unanswerable": True,
}
CONTEXT = "the good film is a story with a clever plot and the actor is very funny in this scene"
LONG = " ".join(f"word{i}" for i in range(60))


def prepare(columns: dict[str, list], **config: object) -> tuple[pa.Table, dict]:
    return TASK.prepare(pa.table(columns), QuestionAnsweringData(source="rows.jsonl", **config))


@pytest.fixture(scope="module")
def folder(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico encoder with a head for questions."""
    path = tmp_path_factory.mktemp("pico") / "qa"
    model = TASK.load_model(pico_model, SPEC)
    model.save_pretrained(path)
    TASK.preprocessor(pico_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return TASK.rows_of(
        [("which film", CONTEXT), {"question": "what is it", "context": LONG}, ("the " * 20, LONG[:100])]
    )


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ({"text": ["film", "good film"], "answer_start": [9, 4]}, ["film", "good film"]),
        ([{"text": "film", "answer_start": 9}], ["film"]),
        (["film", "nowhere"], ["film", "nowhere"]),
        ("film", ["film"]),
    ],
)
def test_answers_are_read_in_every_shape(answer: object, accepted: list[str]) -> None:
    found, info = prepare({"question": ["which"], "context": [CONTEXT], "answers": [answer]})
    assert found["answers"].to_pylist() == [accepted]
    assert (found["start"][0].as_py(), found["end"][0].as_py()) == (9, 13)
    assert info == {"unanswerable": False}


@pytest.mark.parametrize("nothing", [None, "", [], {"text": [], "answer_start": []}])
def test_a_question_without_an_answer_is_kept(nothing: object) -> None:
    found, info = prepare({"question": ["which"], "context": [CONTEXT], "answers": pa.array([nothing])})
    assert (found["answers"].to_pylist(), found["start"].to_pylist()) == ([[]], [-1])
    assert info == {"unanswerable": True}


def test_the_given_place_wins_unless_it_is_wrong() -> None:
    answers = [{"text": ["the"], "answer_start": [48]}, {"text": ["the"], "answer_start": [1]}]
    found, _ = prepare({"question": ["a", "b"], "context": [CONTEXT] * 2, "answers": answers})
    assert found["start"].to_pylist() == [48, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["a"], "context": ["b"]}, "no column 'answers' for `data.answers`"),
        ({"question": ["a"], "context": ["b"], "answers": ["c"]}, "does not stand in the context in column 'answers'"),
        ({"question": [" "], "context": ["b"], "answers": ["b"]}, "no text in column 'question' of row 1"),
        ({"question": ["a"], "context": ["b"], "answers": [[1]]}, "an answer is no text"),
    ],
)
def test_rows_that_cant_be_right_are_refused(columns: dict, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        prepare(columns)


def test_questions_are_made_of_running_text() -> None:
    text = " The film was shot in Rome by Anna Magnani and her crew . Later it won 3 prizes in Rome . Nobody asked . "
    config = QuestionAnsweringData(source="rows.txt", cloze=True, context="text", stride=16)
    table = pa.table({"text": [text, "", None, "= A heading =", text.replace("Anna", "Ada")]})
    made = TASK.derive(table, config)
    assert made.num_rows == 2
    assert TASK.derive(table, config).equals(made)
    rows, info = TASK.prepare(made, config)
    assert not info["unanswerable"]
    for row in rows.to_pylist():
        (answer,) = row["answers"]
        assert answer in ("Anna Magnani", "Ada Magnani", "3")
        assert row["context"][row["start"] : row["end"]] == answer
        assert answer not in row["question"]
        assert " what " in row["question"]
    plain = QuestionAnsweringData(source="rows.txt", context="text", stride=16)
    assert TASK.derive(table, plain) is table
    with pytest.raises(SourceError, match="no question can be made"):
        TASK.derive(pa.table({"text": ["short"]}), config)


def test_windows_that_would_not_advance_are_refused() -> None:
    with pytest.raises(ValueError, match="no room to advance"):
        QuestionAnsweringData(source="rows.jsonl", max_length=128, stride=100)
    for wrong in (["a text"], [("a", "b", "c")], [{"question": "a"}]):
        with pytest.raises(OptimizeError, match="a question and a context"):
            TASK.rows_of(wrong)


def test_windows_cover_a_long_context_and_share_the_stride(folder: Path, rows: pa.Table) -> None:
    windows = TASK.encode(TASK.preprocessor(folder), rows, SPEC)
    assert [window["row"][0] for window in windows] == sorted(window["row"][0] for window in windows)
    mine = [window for window in windows if window["row"] == [1]]
    spans = [[begin for begin in window["begins"] if begin >= 0] for window in mine]
    assert sorted({begin for span in spans for begin in span}) == [LONG.index(word) for word in LONG.split()]
    for before, after in itertools.pairwise(spans):
        assert len(set(before) & set(after)) == SPEC["stride"]
    assert all(len(window["input_ids"]) <= SPEC["max_length"] for window in windows)
    for window in mine:
        for begin, end, token in zip(window["begins"], window["ends"], window["input_ids"], strict=True):
            if begin >= 0:
                assert TASK.preprocessor(folder).decode([token]) == LONG[begin:end]


def test_a_long_question_is_cut(folder: Path, rows: pa.Table) -> None:
    tokenizer = TASK.preprocessor(folder)
    (window,) = [window for window in TASK.encode(tokenizer, rows, SPEC) if window["row"] == [2]][:1]
    assert window["input_ids"].count(tokenizer.convert_tokens_to_ids("the")) == SPEC["max_length"] // 4


def brute_force(windows: list[dict], logits: list[np.ndarray], longest: int) -> tuple[float, int, int, list[float]]:
    spans = [
        (float(scores[i, 0]) + float(scores[j, 1]), -number, -i, window["begins"][i], window["ends"][j])
        for number, (window, scores) in enumerate(zip(windows, logits, strict=True))
        for i in range(len(window["begins"]))
        for j in range(i, min(i + longest, len(window["begins"])))
        if window["begins"][i] >= 0 and window["begins"][j] >= 0
    ]
    logit, _, _, start, end = max(spans)
    return logit, start, end, [span[0] for span in spans]


def test_the_likeliest_span_of_all_windows_is_that_of_a_brute_force_search(folder: Path, rows: pa.Table) -> None:
    generator = np.random.default_rng(0)
    windows = TASK.encode(TASK.preprocessor(folder), rows, SPEC)
    logits = [generator.normal(size=(SPEC["max_length"], 2)).astype(np.float32) for _ in windows]
    spec = {**SPEC, "unanswerable": False}
    found = TASK.combine(logits, windows, rows, spec)
    for row in range(rows.num_rows):
        mine = [number for number, window in enumerate(windows) if window["row"] == [row]]
        logit, start, end, every = brute_force([windows[i] for i in mine], [logits[i] for i in mine], 5)
        assert (found["start"][row], found["end"][row]) == (start, end)
        assert written.texts_of(found)[row] == rows["context"][row].as_py()[start:end]
        assert found["score"][row] == pytest.approx(np.exp(logit) / np.exp(every).sum(), rel=1e-5)


def test_no_answer_is_given_where_it_is_likelier_and_the_data_knows_such_rows(folder: Path, rows: pa.Table) -> None:
    windows = TASK.encode(TASK.preprocessor(folder), rows, SPEC)
    logits = [np.zeros((SPEC["max_length"], 2), dtype=np.float32) for _ in windows]
    for window, scores in zip(windows, logits, strict=True):
        scores[0] = 5.0 if window["row"] != [1] else 1.0
        scores[20] = 2.0
    last = [i for i, window in enumerate(windows) if window["row"] == [0]][-1]
    logits[last][0] = 4.0  # the least of a row's windows counts
    answers = TASK.answers(TASK.combine(logits, windows, rows, SPEC), SPEC)
    assert [answer["answer"] == "" for answer in answers] == [True, False, True]
    assert answers[0]["start"] is None
    assert all(TASK.combine(logits, windows, rows, {**SPEC, "unanswerable": False})["text"] != b"")


def test_a_logit_that_is_no_number_is_not_hidden(folder: Path, rows: pa.Table) -> None:
    windows = TASK.encode(TASK.preprocessor(folder), rows, SPEC)
    logits = [np.full((SPEC["max_length"], 2), np.nan, dtype=np.float32) for _ in windows]
    assert np.isnan(TASK.combine(logits, windows, rows, SPEC)["score"]).all()


def test_an_answer_is_no_longer_than_allowed() -> None:
    logits = np.zeros((10, 2), dtype=np.float32)
    logits[2, 0] = logits[9, 1] = 5.0
    assert likeliest_span(logits, [-1, 0, 2, 4, 6, 8, 10, 12, 14, 16], longest=30)[1] == (2, 9)
    first, last = likeliest_span(logits, [-1, 0, 2, 4, 6, 8, 10, 12, 14, 16], longest=3)[1]
    assert last - first < 3


def test_labels_are_the_tokens_of_the_answer(folder: Path) -> None:
    tokenizer = TASK.preprocessor(folder)
    start = LONG.index("word30")
    found, _ = prepare({"question": ["which", "what"], "context": [LONG, CONTEXT], "answers": [["word30 word31"], []]})
    examples = TASK.examples(tokenizer, found, SPEC)
    answered = [one for one in examples if one["start_positions"]]
    assert answered
    for one in answered:
        assert one["row"] == [0]
        assert one["begins"][one["start_positions"]] == start
        assert LONG[start : one["ends"][one["end_positions"]]] == "word30 word31"
    holding = [one for one in examples if start in one["begins"] and LONG.index("word31") in one["begins"]]
    assert len(holding) == len(answered) < len(examples)
    batch = TASK.collate_examples(tokenizer, examples)
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    assert batch["start_positions"].tolist() == [one["start_positions"] for one in examples]


def test_latency_inputs_are_real_and_never_padding(folder: Path, rows: pa.Table) -> None:
    tokenizer = TASK.preprocessor(folder)
    inputs = TASK.latency_inputs(tokenizer, rows, SPEC, batch_size=4, sequence_length=48)
    assert inputs["input_ids"].shape == (4, 48)
    assert inputs["attention_mask"].all()
    with pytest.raises(EvaluationError, match="longer than the model's 64"):
        TASK.latency_inputs(tokenizer, rows, SPEC, batch_size=1, sequence_length=65)


def test_the_same_answer_whatever_the_batch(folder: Path, rows: pa.Table) -> None:
    runner, tokenizer = runtimes.get("transformers").open(folder, 1), TASK.preprocessor(folder)
    alone = TASK.respond(runner, tokenizer, rows, SPEC, batch_size=1)
    together = TASK.respond(runner, tokenizer, rows, SPEC, batch_size=16)
    assert (alone["text"] == together["text"]).all()
    np.testing.assert_allclose(alone["score"], together["score"], rtol=1e-4)
    with pytest.raises(EvaluationError, match="gives no `start_logits`"):
        TASK.read_outputs({"logits": np.zeros((1, 2))}, {})


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "overlap"),
    [
        ("The Film!", "film", 1, 1),
        ("a  good, film", "Good film", 1, 1),
        ("a very good film", "film", 0, 0.5),
        ("film film", "film", 0, 2 / 3),
        ("story", "film", 0, 0),
        ("", "", 1, 1),
        ("", "film", 0, 0),
        ("the", "a", 1, 1),
        ("anthem", "them", 0, 0),
    ],
)
def test_scores_of_a_single_answer(answer: str, accepted: str, exact: float, overlap: float) -> None:
    """By hand, from the rules of the official script."""
    assert exact_match(answer, accepted) == exact
    assert f1(answer, accepted) == pytest.approx(overlap)


def test_scores_take_the_best_accepted_answer() -> None:
    assert normalise("An apple, the A-Team") == "apple ateam"
    assert best(f1, "good film", ["film", "a good film"]) == 1
    assert best(exact_match, "", []) == best(exact_match, "", ["the"]) == 1
    assert best(f1, "film", []) == 0
    outputs = written.records(["film", "fïlm", ""], score=np.zeros(3, dtype=np.float32))
    targets = TASK.targets(pa.table({"answers": [["film"], ["fïlm noir"], ["x"]]}))
    assert EXACT_MATCH.compute(outputs, targets) == pytest.approx(1 / 3)
    assert F1.per_row is not None
    assert F1.per_row(outputs, targets).tolist() == pytest.approx([1, 2 / 3, 0])


def test_fidelity_and_flips_tell_other_answers() -> None:
    rows = pa.table({"question": ["a", "b"], "context": ["c", "d"]})
    numbers = {"start": np.array([0, 0], dtype=np.int32), "end": np.array([1, 1], dtype=np.int32)}
    ours = written.records(["c", ""], **numbers, score=np.array([0.5, 0.25], dtype=np.float32))
    theirs = written.records(["c", "d"], **numbers, score=np.array([0.5, 0.75], dtype=np.float32))
    found = TASK.fidelity(ours, theirs)
    assert (found["n"], found["flips"], found["flip_rate"], found["difference"]["max"]) == (2, 1, 0.5, 0.5)
    (flip,) = TASK.flips(None, rows, ours, theirs, SPEC)
    assert (flip["row"], flip["question"]) == (1, "b")
    assert (flip["baseline"]["answer"], flip["candidate"]["answer"]) == ("d", "")
    assert TASK.flips(None, rows, ours, ours, SPEC) == []


@pytest.fixture(scope="module")
def recipe(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The word behind `film` answers every question: a thing that a pico encoder learns."""
    folder = tmp_path_factory.mktemp("qa")
    generator = np.random.default_rng(0)
    lines = []
    for number in range(120):
        words = [f"word{i}" for i in generator.choice(150, size=12 if number % 4 else 40, replace=False)]
        place = int(generator.integers(len(words)))
        words.insert(place, "film")
        context, answer = " ".join(words), words[place + 1 : place + 2]
        lines.append(json.dumps({"question": "which film", "context": context, "answers": answer}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {
        "version": 1,
        "name": "pico-qa",
        "model": {"source": str(pico_model), "task": "question-answering"},
        "data": {
            "source": str(folder / "rows.jsonl"),
            **{"max_length": 32, "stride": 8, "max_question_length": 8, "max_answer_length": 3},
            "splits": {"train": 0.5, "validation": 0.2, "evaluation": 0.3},
        },
        "stages": [
            {"distill": "finetune", "epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "threads": 1},
            {"export": "onnx"},
            {"quantize": "int8", "mode": "dynamic"},
        ],
        "baseline": "finetune",
        "evaluate": {"latency": None, "peak_memory": False},
        "gates": [{"metric": "exact_match", "max_drop": 1.0}, {"metric": "f1", "max_drop": 1.0}],
    }


def test_a_recipe_runs_and_its_artifact_answers(recipe: dict, tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    run = optimize.apply(recipe, work=work)
    assert run.document["error"] is None
    finetuned, exported, _ = run.document["artifacts"]
    assert exported["scores"]["fidelity"]["parent"]["flips"] == 0
    assert exported["scores"]["f1"]["value"] == finetuned["scores"]["f1"]["value"]
    details = work.store.open(finetuned["digest"]).details
    assert set(details["validation"]) == {"loss", "exact_match", "f1"}
    model = optimize.load(exported["path"])
    context = LONG + " film word3"
    (answer,) = model.predict([{"question": "which film", "context": context}])
    assert answer["answer"] == context[answer["start"] : answer["end"]]
    assert 0 < answer["score"] <= 1
