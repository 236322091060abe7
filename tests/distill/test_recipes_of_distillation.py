"""Teachers and students in recipes: what `validate` says of them, and the chain from one to the other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rooms import QUICK

import optimize
from optimize import stages
from optimize.errors import RecipeError
from optimize.planning import sources
from optimize.recipe import load
from optimize.work import Work

STEPS: list[dict[str, Any]] = [
    {"distill": "student", "num_hidden_layers": 1},
    {"distill": "logits", "teacher": "source", **QUICK},
    {"export": "onnx"},
]


def faults(recipe: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    return [fault.message for fault in caught.value.diagnostics]


def test_a_student_of_the_source_is_made_and_taught(pico_recipe: dict[str, Any], work: Work) -> None:
    recipe = {**pico_recipe, "stages": STEPS, "baseline": "source"}
    recipe["evaluate"] = {"latency": None, "peak_memory": False}
    recipe["gates"] = [{"metric": "size", "max_ratio": 1}]
    run = optimize.apply(recipe, work=work)
    assert run.verdict == "pass"
    again = optimize.apply(recipe, work=work)
    assert all(artifact["cached"] for artifact in again.document["artifacts"])
    changed = optimize.plan(recipe, work=work, overrides=["stages.logits.alpha=0.9"])
    assert [step.why for step in changed.steps if step.name == "logits"] == ["alpha: 0.5 -> 0.9"]


def test_a_teacher_has_to_be_of_a_format_that_can_teach(pico_recipe: dict[str, Any]) -> None:
    wrong = [{"export": "onnx"}, {"distill": "logits", "teacher": "onnx", "from": "source"}]
    (told,) = faults({**pico_recipe, "stages": wrong, "baseline": "source"})
    assert told == "`onnx` is onnx, and the teacher has to be transformers or pytorch"
    (told,) = faults({**pico_recipe, "stages": [{"distill": "logits", "teacher": "later"}], "baseline": "source"})
    assert told == "no earlier stage is named `later`"


def test_a_source_without_a_head_teaches_nothing(pico_recipe: dict[str, Any], pico_model: Path, work: Work) -> None:
    recipe = {**pico_recipe, "stages": STEPS[:2], "baseline": "logits", "gates": []}
    recipe["model"] = {**recipe["model"], "task": "fill-mask"}
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "label"}
    with pytest.raises(RecipeError, match="nothing to learn from it"):
        optimize.apply(recipe, work=work)


def test_adapters_want_peft_only_where_they_are_asked_for(
    pico_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimize.recipe.stages.installed", lambda name: name != "peft")
    load(pico_recipe)
    pico_recipe["stages"][0]["lora"] = {"r": 4}
    assert faults(pico_recipe) == ["`lora` needs peft, which is not installed"]


def test_another_model_s_bytes_are_part_of_the_key(
    pico_recipe: dict[str, Any], pico_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pico_model, other)
    steps = [{"distill": "student", "source": str(other)}]
    recipe = load({**pico_recipe, "stages": steps, "baseline": "student", "gates": []})
    before = sources(recipe, recipe.stages[0])["source"].identity
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert sources(recipe, recipe.stages[0])["source"].identity != before
    steps[0]["source"] = str(tmp_path / "nowhere")
    (told,) = faults({**pico_recipe, "stages": steps, "baseline": "student", "gates": []})
    assert "nowhere" in told
    assert stages.find("distill", "student")[0].sources == ("source",)
