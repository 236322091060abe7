"""Tasks of text from the recipe to an answer: trained where they can be, exported, rounded to 8 bits, and asked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import optimize
from optimize.run import Run
from optimize.work import Work

GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "dull", "awful", "boring"]
PLAIN = ["the", "a", "film", "story", "actor", "scene", "plot", "with", "and", "of"]


def applied(work: Work, model: Path, task: str, rows: list[dict[str, Any]], stages: list[dict], **more: Any) -> Run:
    file = work.root / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "version": 1,
        "name": task,
        "model": {"source": str(model), "task": task},
        "data": {
            "source": str(file),
            "splits": {"train": 0.6, "validation": 0.2, "evaluation": 0.2},
            **more.pop("data", {}),
        },
        "stages": [*stages, {"export": "onnx"}, {"quantize": "int8", "mode": "dynamic"}],
        "evaluate": {"latency": None, "peak_memory": False, **more.pop("evaluate", {})},
        **more,
    }
    return optimize.apply(recipe, work=work)


def finetune(**more: Any) -> dict[str, Any]:
    return {"distill": "finetune", "learning_rate": 3e-3, "batch_size": 16, "threads": 1, "device": "cpu", **more}


def scores(run: Run, metric: str) -> list[float]:
    return [artifact["scores"][metric]["value"] for artifact in run.document["artifacts"]]


def sentences(seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    found = {tuple(draw.choices(PLAIN + GOOD + BAD, k=draw.randint(4, 12))) for _ in range(200)}
    return [list(words) for words in sorted(found)]


def test_words_learn_their_labels(work: Work, pico_model: Path) -> None:
    def tag(word: str) -> str:
        return "B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O"

    rows = [{"tokens": words, "tags": [tag(word) for word in words]} for words in sentences(0)]
    run = applied(
        work, pico_model, "token-classification", rows, [finetune(epochs=6)], baseline="finetune",
        gates=[{"metric": "entity_f1", "max_drop": 0.1}, {"metric": "token_accuracy", "min": 0.5}],
    )  # fmt: skip
    assert run.verdict == "pass"
    assert min(scores(run, "entity_f1")) > 0.9
    (answer,) = run["int8"].predict(["the film, a great story"])
    assert [(one["label"], one["text"]) for one in answer["entities"]] == [("GOOD", "great")]


def test_masks_are_filled(work: Work, pico_model: Path) -> None:
    rows = [{"text": " ".join(words)} for words in sentences(1)]
    run = applied(
        work, pico_model, "fill-mask", rows, [finetune(epochs=10)], baseline="finetune",
        gates=[{"metric": "pseudo_perplexity", "max_ratio": 1.2}], evaluate={"metrics": ["top5"]},
    )  # fmt: skip
    assert run.document["error"] is None
    # There are 18 words: one that knows as much has a perplexity of 18, and an untrained one of all 190.
    assert max(scores(run, "pseudo_perplexity")) < 40
    (answer,) = run["int8"].predict(["the [MASK] film"])
    assert answer["fills"][0][0]["token"] in PLAIN + GOOD + BAD


def test_vectors_keep_their_neighbours(work: Work, pico_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    encoder = tmp_path / "encoder"
    AutoModel.from_pretrained(pico_model).save_pretrained(encoder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pico_model / name, encoder / name)
    rows = [{"text": " ".join(words), "text_pair": " ".join(words[:-1])} for words in sentences(2)]
    run = applied(
        work, encoder, "sentence-similarity", rows, [], data={"pooling": "mean"},
        evaluate={"metrics": ["recall_at_1"]}, gates=[{"metric": "recall_at_5", "max_drop": 0.2}],
    )  # fmt: skip
    assert run.document["error"] is None
    source, onnx, int8 = scores(run, "recall_at_5")
    assert source == onnx > 0.9
    assert int8 > 0.8
    fidelity = run.document["artifacts"][-1]["scores"]["fidelity"]["baseline"]
    assert 0 < fidelity["cosine_distance"]["mean"] < 0.01
    vectors = run["int8"].predict(["the film", "the story"])
    assert len(vectors[0]["embedding"]) == 32
