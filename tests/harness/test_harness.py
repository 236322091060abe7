"""lm-eval over a task of ours in a folder, through our runtimes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.errors import EvaluationError

pytest.importorskip("lm_eval")

from optimize import harness

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
"""
TASKS = {
    "pico_choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: a
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
""",
    "pico_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "pico_generate": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match, higher_is_better: true, aggregation: mean}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": f"the film is {word}",
            "choices": ["good", "bad", "dull film"],
            "a": i % 3,
            "text": f"a {word} plot. " * 40,
        }
        for i, word in enumerate(("fine", "flat", "moving", "stale"))
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}" + COMMON.format(rows=path / "rows.jsonl") + text)
    return path


@pytest.fixture(scope="module")
def model(pico_llama: Path) -> optimize.Model:
    return optimize.load(pico_llama, threads=1)


def test_tasks_are_scored(model: optimize.Model, folder: Path) -> None:
    found = harness.evaluate(model, list(TASKS), include_path=folder, limit=3)
    assert found["results"].keys() == TASKS.keys()
    assert found["results"]["pico_choice"]["acc,none"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert found["results"]["pico_rolling"]["word_perplexity,none"] > 1
    assert found["n-samples"]["pico_generate"]["effective"] == 3


def test_answers_are_those_of_the_harness_own_model(model: optimize.Model, pico_llama: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from optimize.harness.model import HarnessModel

    ours = HarnessModel(model, batch_size=4)
    theirs = HFLM(pretrained=str(pico_llama), device="cpu", dtype="float32", batch_size=4)

    def both(kind: str, *arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        requests = [Instance(kind, {}, one, 0) for one in arguments]
        return tuple(getattr(one, kind)(requests, disable_tqdm=True) for one in (ours, theirs))

    long = "the plot of a film " * 40  # longer than the model's 256 positions
    pairs = [("the film is ", "good"), ("", "a dull film"), ("it is", " it is it is"), (long, " fine")]
    for mine, other in zip(*both("loglikelihood", *pairs), strict=True):
        assert mine == (pytest.approx(other[0], rel=1e-4), other[1])
    mine, other = both("loglikelihood_rolling", (long,), ("a film",))
    assert mine == pytest.approx(other, rel=1e-4)
    mine, other = both("generate_until", ("the film is", {"until": ["."], "max_gen_toks": 12}))
    assert mine[0].rstrip("�") == other[0].rstrip("�")


def test_the_command(pico_llama: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from optimize.cli import main

    arguments = ["harness", str(pico_llama), "--tasks", "pico_choice, pico_rolling", "--include-path", str(folder)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--limit", "2", "--json"])
    assert ended.value.code in (0, None)
    found = json.loads(capfd.readouterr().out)
    assert found["n-samples"]["pico_choice"]["effective"] == 2
    with pytest.raises(SystemExit):
        main([*arguments, "--limit", "2"])
    shown = capfd.readouterr().out
    assert re.search(r"pico_choice +acc +[01]\.\d{4} +\d\.\d{4}", shown)
    assert "word_perplexity" in shown


def test_what_can_not_be_scored(
    model: optimize.Model, pico_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    whole = tasks.TaskManager  # its own tasks take many seconds to list
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: whole(None, include_path, False))
    with pytest.raises(EvaluationError, match="no task 'pico_chioce'"):
        harness.evaluate(model, ["pico_chioce"], include_path=folder)
    with pytest.raises(EvaluationError, match="asks language models"):
        harness.evaluate(pico_model, ["pico_choice"])
