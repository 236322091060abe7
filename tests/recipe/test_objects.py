"""Recipes written in Python: objects and mappings say what a file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize import stages
from optimize.distill import finetune
from optimize.errors import RecipeError
from optimize.export import onnx
from optimize.quantize import int8_onnxruntime as int8
from optimize.recipe import Evaluate, Gate, Model, Promote, Recipe, load
from optimize.recipe.objects import written

TRAINED = finetune.Config(epochs=5, batch_size=16, learning_rate=2e-3, threads=1)


def test_objects_and_mappings_make_the_same_recipe(pico_recipe: dict[str, Any]) -> None:
    wanted = load(pico_recipe, env=False)
    mappings = {name: value for name, value in pico_recipe.items() if name != "version"}
    assert Recipe(**mappings) == wanted
    made = optimize.Recipe(
        name="pico-sentiment",
        model=Model(**pico_recipe["model"]),
        data=wanted.data,
        stages=[TRAINED, onnx.Config(), int8.Config(mode="dynamic")],
        baseline="finetune",
        evaluate=Evaluate(latency=wanted.evaluate.latency),
        gates=[Gate(metric="size", max_ratio=1.5)],
    )
    assert made.digest == wanted.digest
    assert made.stages[0].config == TRAINED
    assert (made.file, made.base) == (None, Path.cwd())


def test_a_stage_has_a_name_and_a_parent(pico_recipe: dict[str, Any]) -> None:
    forked = [
        optimize.stage(TRAINED, name="teacher"),
        onnx.Config(),
        int8.Config(),
        optimize.stage(int8.Config(mode="static"), name="static", from_="onnx"),
    ]
    recipe = Recipe(
        **{**pico_recipe, "stages": forked, "baseline": "teacher", "promote": Promote(alias="best", select="accuracy")}
    )
    assert [(stage.name, stage.parent) for stage in recipe.stages] == [
        ("teacher", "source"),
        ("onnx", "teacher"),
        ("int8", "onnx"),
        ("static", "onnx"),
    ]
    assert recipe.promote == Promote(alias="best", select="accuracy")


def test_the_environment_does_not_change_what_python_says(
    pico_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIMIZE_RECIPE__STAGES__0__EPOCHS", "9")
    assert Recipe(**pico_recipe).stages[0].config.model_dump()["epochs"] == 5
    assert load(pico_recipe).stages[0].config.model_dump()["epochs"] == 9


def test_every_mistake_is_said_as_of_a_file(pico_recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**{**pico_recipe, "baseline": "finetun", "gates": [{"metric": "acuracy", "max_drop": 0.1}]})
    told = [found.hint for found in caught.value.diagnostics]
    assert any("`finetune`" in str(hint) for hint in told)
    assert any("`accuracy`" in str(hint) for hint in told)


def test_what_is_no_methods_config_is_no_stage() -> None:
    with pytest.raises(TypeError, match="is no method's Config"):
        optimize.stage(Gate(metric="size", max_ratio=1))


@pytest.mark.parametrize("entry", stages.entries(), ids=lambda entry: f"{entry.id}-{entry.backend}-{entry.takes[0]}")
def test_every_method_is_found_by_its_config(entry: stages.Entry) -> None:
    said = written(entry.load().Config.model_construct())
    assert (said[entry.verb], said.get("backend")) == (entry.method, entry.backend)


def test_apply_and_plan_take_it(pico_recipe: dict[str, Any], work: Any) -> None:
    planned = optimize.plan(Recipe(**pico_recipe), work=work)
    assert [step.status for step in planned.steps] == ["RUN"] * 4
