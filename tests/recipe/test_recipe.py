"""Reading, overriding, resolving and checking recipes."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optimize import recipe as recipes
from optimize import stages
from optimize.config import Block
from optimize.errors import Diagnostic, RecipeError
from optimize.recipe import Recipe, json_schema, load, with_gates

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"

TEXT = """\
version: 1
name: tiny
model:
  source: ./model
  task: text-classification
data:
  source: rows.csv
stages:
  - distill: finetune
    name: teacher
    epochs: 2
  - export: onnx
  - quantize: int8
baseline: teacher
gates:
  - metric: accuracy
    max_drop: 0.02
  - metric: latency
    min_speedup: 1.5
    over: onnx
    on: int8
promote:
  alias: production
"""


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("OPTIMIZE_RECIPE__")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the model and rows that `TEXT` names."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "rows.csv").write_text("text,label\nfine,1\n")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> list[Diagnostic]:
    with pytest.raises(RecipeError) as caught:
        load(write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.diagnostics)


def only(found: list[Diagnostic]) -> Diagnostic:
    assert len(found) == 1, [item.message for item in found]
    return found[0]


def edit(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


# What a good recipe becomes


def test_quickstart() -> None:
    recipe = load(QUICKSTART)
    assert [stage.id for stage in recipe.stages] == ["distill.finetune", "export.onnx", "quantize.int8"]
    assert [stage.name for stage in recipe.stages] == ["teacher", "onnx", "int8"]
    assert [stage.parent for stage in recipe.stages] == ["source", "teacher", "onnx"]
    assert recipe.baseline == "teacher"
    assert [gate.limit for gate in recipe.gates] == [("max_drop", 0.02), ("min_speedup", 1.5), ("max_ratio", 0.35)]
    assert recipe.gates[1].over == "onnx"
    assert recipe.promote is not None
    assert (recipe.promote.alias, recipe.promote.select) == ("production", None)
    assert recipe.stage("teacher").config.model_dump()["learning_rate"] == pytest.approx(1e-4)
    assert recipe.file == QUICKSTART
    assert recipe.base == QUICKSTART.parent


def test_a_mapping_is_a_recipe(pico_recipe: dict[str, Any]) -> None:
    before = copy.deepcopy(pico_recipe)
    recipe = load(pico_recipe, ["stages.finetune.epochs=3"])
    assert pico_recipe == before, "the mapping belongs to the caller"
    assert recipe.stages[0].config.model_dump()["epochs"] == 3
    assert (recipe.file, recipe.base) == (None, Path.cwd())
    assert [stage.name for stage in recipe.leaves] == ["int8"]


def test_tuples_and_paths_of_python_are_lists_and_strings(pico_recipe: dict[str, Any]) -> None:
    pico_recipe["stages"] = tuple(pico_recipe["stages"])
    pico_recipe["data"]["source"] = Path(pico_recipe["data"]["source"])
    assert load(pico_recipe).data.source == str(pico_recipe["data"]["source"])


def test_base_moves_relative_paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    document = load(write(folder, TEXT)).document()
    assert load(document, base=folder).base == folder
    with pytest.raises(RecipeError):
        load(document, base=tmp_path_factory.mktemp("elsewhere"))


def test_metrics_are_resolved(folder: Path) -> None:
    assert load(write(folder, TEXT)).evaluate.metrics == ("accuracy",)
    text = edit("metric: accuracy\n    max_drop: 0.02", "metric: macro_f1\n    min: 0.5")
    assert load(write(folder, text)).evaluate.metrics == ("accuracy", "macro_f1")
    assert load(write(folder, text + "evaluate: {metrics: ['mine.scores:kappa']}\n")).evaluate.metrics == (
        "mine.scores:kappa",
        "macro_f1",
    )


def test_leaves_are_what_nobody_builds_on(folder: Path) -> None:
    forked = edit("  - quantize: int8\n", "  - quantize: int8\n  - export: onnx\n    name: again\n    from: teacher\n")
    recipe = load(write(folder, forked + "  select: accuracy\n"))
    assert [stage.name for stage in recipe.leaves] == ["int8", "again"]


def test_without_on_the_other_leaves_are_judged(folder: Path) -> None:
    forked = edit("  - quantize: int8\n", "  - quantize: int8\n  - export: onnx\n    name: again\n    from: teacher\n")
    text = forked.replace("over: onnx\n    on: int8", "over: again") + "  select: accuracy\n"
    assert load(write(folder, text)).gates[1].over == "again"


def test_a_childless_baseline_is_no_leaf_unless_it_is_all_there_is(folder: Path) -> None:
    text = TEXT.replace("  - export: onnx\n", "  - export: onnx\n    from: source\n")
    assert [stage.name for stage in load(write(folder, text)).leaves] == ["int8"]
    alone = TEXT.split("  - export", maxsplit=1)[0] + "baseline: teacher\n"
    assert [stage.name for stage in load(write(folder, alone)).leaves] == ["teacher"]


# Digests


def test_the_digest_is_of_the_meaning(folder: Path) -> None:
    digest = load(write(folder, TEXT)).digest
    assert digest.startswith("sha256:")
    same = (
        "# a comment\n" + TEXT,
        edit("    epochs: 2\n", "    epochs: 2.0 # twice\n"),
        edit("  - export: onnx\n", "  - {export: onnx, from: teacher, name: onnx}\n"),
        TEXT.replace("baseline: teacher\n", "") + "baseline: 'teacher'\n",
        TEXT + "evaluate: {metrics: [accuracy], latency: {threads: 1}}\n",
    )
    for text in same:
        assert load(write(folder, text)).digest == digest, text
    assert load(write(folder, edit("epochs: 2", "epochs: 1")), ["stages.0.epochs=2"]).digest == digest
    assert load(write(folder, edit("epochs: 2", "epochs: 3"))).digest != digest
    assert load(write(folder, edit("0.02", "0.03"))).digest != digest


def test_the_normal_form_loads_as_the_same_recipe(folder: Path, pico_recipe: dict[str, Any]) -> None:
    for recipe in (load(write(folder, TEXT)), load(pico_recipe), load(QUICKSTART)):
        document = json.loads(json.dumps(recipe.document()))
        again = load(document, base=recipe.base)
        assert again.digest == recipe.digest
        assert again.document() == recipe.document()


def test_the_digest_holds_no_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    (folder / "recipe.yaml").unlink(missing_ok=True)
    digest = load(write(folder, TEXT)).digest
    folder.rename(elsewhere)
    assert load(elsewhere / "recipe.yaml").digest == digest


# YAML as people write it


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "+1e-4"])
def test_numbers_follow_yaml_1_2(folder: Path, number: str) -> None:
    recipe = load(write(folder, edit("epochs: 2", f"learning_rate: {number}")))
    assert recipe.stages[0].config.model_dump()["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize("word", ["yes", "on", "True1", "'true'", "1", "y"])
def test_words_are_no_truth_values(folder: Path, word: str) -> None:
    found = only(mistakes(folder, edit("  task: t", f"  trust_remote_code: {word}\n  task: t")))
    assert found.message.startswith("expected true or false, got ")
    assert found.path == "model.trust_remote_code"


def test_text_is_no_number(folder: Path) -> None:
    found = only(mistakes(folder, edit("epochs: 2", "epochs: '2'")))
    assert found.message == "expected a number above 0, got '2'"


def test_an_anchor_may_be_used_and_overridden_in_one_place(folder: Path) -> None:
    text = edit("  - export: onnx\n", "  - &export\n    export: onnx\n    tolerance: 0.01\n    name: onnx\n")
    text = text.replace("  - quantize: int8\n", "  - quantize: int8\n  - *export\n") + "  select: accuracy\n"
    recipe = load(write(folder, text), ["stages.3.name=b", "stages.3.from=teacher", "stages.3.tolerance=0.5"])
    assert [stage.config.model_dump().get("tolerance") for stage in recipe.stages[1::2]] == [0.01, 0.5]


# Overrides


def test_overrides_by_index_and_by_name(folder: Path) -> None:
    path = write(folder, TEXT)
    recipe = load(path, ["stages.0.epochs=1", "stages.int8.mode=dynamic", "evaluate.latency.batch_sizes=[1]"])
    assert recipe.stages[0].config.model_dump()["epochs"] == 1
    assert recipe.evaluate.latency is not None
    assert recipe.evaluate.latency.batch_sizes == (1,)
    assert load(path, ["evaluate.latency=null", "gates=[]", "promote="]).evaluate.latency is None
    assert load(path, ["promote="]).promote is None
    assert load(path, ["data.filter={kind: film}"]).data.filter == {"kind": "film"}


def test_the_environment_overrides_the_file_and_set_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, TEXT)
    monkeypatch.setenv("OPTIMIZE_RECIPE__STAGES__TEACHER__EPOCHS", "5")
    monkeypatch.setenv("optimize_recipe__data__seed", "7")

    def read(recipe: Recipe) -> tuple[float, int]:
        return recipe.stages[0].config.model_dump()["epochs"], recipe.data.seed

    assert read(load(path)) == (5, 7)
    assert read(load(path, ["stages.0.epochs=6"])) == (6, 7)
    assert read(load(path, env=False)) == (2, 0)


def test_a_name_with_dots_can_be_overridden(folder: Path) -> None:
    text = edit("name: teacher", "name: teacher.v2").replace("baseline: teacher", "baseline: teacher.v2")
    assert load(write(folder, text), ["stages.teacher.v2.epochs=4"]).stages[0].config.model_dump()["epochs"] == 4


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("stages.teecher.epochs=1", "no stage is named `teecher`", "did you mean `teacher`?"),
        ("stages.9.epochs=1", "there is no number 9 here: 3 in all, counted from 0", None),
        ("gates.accuracy.max_drop=1", "`accuracy` must be a number, counted from 0", None),
        ("stages.0.epoch=1", "unknown key `epoch`", "did you mean `epochs`?"),
        ("stage.0.epochs=1", "unknown key `stage`", "did you mean `stages`?"),
        ("name.first=x", "there is nothing below this value to set `first` in", None),
        ("stages.0.epochs=many", "expected a number above 0, got 'many'", None),
        ("stages.0.epochs=.inf", "a number must be finite", None),
        ("stages.0.epochs=!!int 3", "YAML tags such as `tag:yaml.org,2002:int` are refused", "leave the tag out"),
        ("stages.0.epochs", "an override has the form KEY=VALUE", "such as stages.0.epochs=2"),
    ],
)
def test_a_wrong_override_is_named_as_the_place(folder: Path, override: str, message: str, hint: str | None) -> None:
    found = only(mistakes(folder, TEXT, (override,)))
    assert (found.message, found.hint, found.location) == (message, hint, f"--set {override}")


def test_an_override_can_not_nest_without_end(folder: Path) -> None:
    found = mistakes(folder, TEXT, ("data.filter" + ".x" * 5000 + "=1",))
    assert "this is nested more than 24 deep" in [item.message for item in found]


def test_a_wrong_variable_is_named_as_the_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_RECIPE__STAGES__0__EPOCHS", "-1")
    found = only(mistakes(folder, TEXT))
    assert found.location == "OPTIMIZE_RECIPE__STAGES__0__EPOCHS=-1"


# Mistakes: place, words, suggestion

MISTAKES: dict[str, tuple[str, str, str, str, str | None]] = {
    # name: (old, new, "line:column path", message, hint)
    "unknown key": (
        *("epochs: 2", "epoch: 2", "11:5 stages[0].epoch"),
        *("unknown key `epoch`", "did you mean `epochs`?"),
    ),
    "unknown common key": (
        *("    epochs: 2", "    nam: x", "11:5 stages[0].nam"),
        *("unknown key `nam`", "did you mean `name`?"),
    ),
    "unknown top key": (
        *("promote:\n  alias: production", "promotes: {}", "22:1 promotes"),
        *("unknown key `promotes`", "did you mean `promote`?"),
    ),
    "verb": (
        *("- export: onnx", "- exprot: onnx", "12:5 stages[1].exprot"),
        *("a stage needs a verb, such as `export: onnx`", "did you mean `export`?"),
    ),
    "no verb": (
        *("- quantize: int8", "- name: int8", "13:5 stages[2]"),
        *("a stage needs a verb, such as `export: onnx`", "one of distill, prune, quantize, export"),
    ),
    "verb and name": (
        *("- quantize: int8", "- quantize: int8\n  - qauntize: int8", "14:5 stages[3].qauntize"),
        *("a stage needs a verb, such as `export: onnx`", "did you mean `quantize`?"),
    ),
    "two verbs": (
        *("- export: onnx", "- export: onnx\n    prune: x", "13:5 stages[1].prune"),
        *("a stage has one verb; this one has `export` and `prune`", "make them two stages"),
    ),
    "method": (
        *("- export: onnx", "- export: onxx\n    name: onnx", "12:13 stages[1].export"),
        *("`export` has no method `onxx`", "did you mean `onnx`?"),
    ),
    "method of another verb": (
        *("- quantize: int8", "- export: int8", "13:13 stages[2].export"),
        *("`export` has no method `int8`", "did you mean `quantize: int8`?"),
    ),
    "back end": (
        *("- quantize: int8", "- quantize: int8\n    backend: onnxruntme", "14:14 stages[2].backend"),
        *("`quantize: int8` has no back end 'onnxruntme'", "did you mean `onnxruntime`?"),
    ),
    "from": (
        *("- quantize: int8", "- quantize: int8\n    from: onx", "14:11 stages[2].from"),
        *("no earlier stage is named `onx`", "did you mean `onnx`?"),
    ),
    "from itself": (
        *("- quantize: int8", "- quantize: int8\n    from: int8", "14:11 stages[2].from"),
        *("the stage `int8` can't build on itself", None),
    ),
    "order": (
        "  - export: onnx\n  - quantize: int8",
        *("  - quantize: int4\n    name: int8\n  - export: onnx\n    from: teacher", "12:5"),
        "`quantize: int4` takes onnx or openvino, but stage `teacher` gives transformers",
        "put `- export: onnx` before it",
    ),
    "order, by a fork": (
        *("- quantize: int8", "- quantize: int8\n  - export: onnx\n    name: b", "14:5 stages[3].export"),
        "`export: onnx` takes pytorch or transformers, but stage `int8` gives onnx",
        "say `from: teacher`, or move it up",
    ),
    "same name": (
        *("- export: onnx", "- export: onnx\n  - export: onnx\n    from: teacher", "13:13 stages[2].export"),
        *("stages[1] is named `onnx` too", "give it a `name:`"),
    ),
    "reserved name": (
        *("- quantize: int8", "- quantize: int8\n  - quantize: int8\n    name: source", "15:11 stages[3].name"),
        *("`source` is the name of the source model", "choose another name"),
    ),
    "task": (
        *("task: text-classification", "task: text-clasification", "5:9 model.task"),
        *("no task is named `text-clasification`", "did you mean `text-classification`?"),
    ),
    "missing key": ("  source: ./model\n", "", "3:1 model", "the key `source` is missing", None),
    "data key": (
        *("source: rows.csv", "source: rows.csv\n  lable: y", "8:3 data.lable"),
        *("unknown key `lable`", "did you mean `label`?"),
    ),
    "baseline": (
        *("baseline: teacher", "baseline: techer", "14:11 baseline"),
        *("no stage is named `techer`", "did you mean `teacher`?"),
    ),
    "gate on": (
        *("on: int8", "on: [int8, onxx]", "21:16 gates[1].on[1]"),
        *("no stage is named `onxx`", "did you mean `onnx`?"),
    ),
    "gate over": (
        *("over: onnx", "over: onxx", "20:11 gates[1].over"),
        *("no stage is named `onxx`", "did you mean `onnx`?"),
    ),
    "gate metric": (
        *("metric: accuracy", "metric: acuracy", "16:13 gates[0].metric"),
        *("nothing measures `acuracy`", "did you mean `accuracy`?"),
    ),
    "gate on itself": (
        *("on: int8", "on: onnx", "18:5 gates[1]"),
        *("this gate compares `onnx` with itself", "change `on` or `over`"),
    ),
    "gate on the only leaf over itself": (
        *("over: onnx\n    on: int8", "over: int8", "18:5 gates[1]"),
        *("this gate compares `int8` with itself", "change `on` or `over`"),
    ),
    "absolute limit with over": (
        *("min_speedup: 1.5", "max_ms: 20", "20:11 gates[1].over"),
        *("`max_ms` compares with nothing, so `over` says nothing", "leave it out"),
    ),
    "direction": (
        *("max_drop: 0.02", "max_increase: 0.02", "17:5 gates[0].max_increase"),
        *("`max_increase` makes no sense for `accuracy`: more is better", "did you mean `max_drop`?"),
    ),
    "direction of latency": (
        *("min_speedup: 1.5", "max_drop: 1.5", "19:5 gates[1].max_drop"),
        *("`max_drop` makes no sense for `latency`: it is compared as a ratio", "did you mean `min_speedup`?"),
    ),
    "limit of latency": (
        *("max_drop: 0.02", "min_speedup: 2", "17:5 gates[0].min_speedup"),
        *("`min_speedup` is a limit of latency, not of `accuracy`", None),
    ),
    "range": (
        *("min_speedup: 1.5", "min_speedup: 0", "19:18 gates[1].min_speedup"),
        *("expected a number above 0, got 0", None),
    ),
    "two limits": (
        *("max_drop: 0.02", "max_drop: 0.02\n    min: 0.9", "16:5 gates[0]"),
        "a gate has exactly one limit of min, max, max_ms, max_drop, max_increase, min_ratio, max_ratio, "
        "min_speedup; this one has min and max_drop",
        None,
    ),
    "latency is not measured": (
        *("baseline: teacher", "evaluate: {latency: null}", "18:13 gates[1].metric"),
        *("nothing measures `latency`", "turn on `evaluate.latency`"),
    ),
    "a time that the task does not have": (
        *("metric: latency", "metric: decode", "18:13 gates[1].metric"),
        *("`decode` does not apply to text-classification", "its speed is `latency`"),
    ),
    "settings of another task": (
        *("baseline: teacher", "evaluate: {latency: {threads: 1, prefill: [8]}}", "14:34 evaluate.latency.prefill"),
        *("`prefill` does not apply to text-classification",),
        "its speed is measured at `batch_sizes` and `sequence_length`",
    ),
    "choice": (
        *("    over: onnx", "    over: onnx\n    on_inconclusive: wran", "21:22 gates[1].on_inconclusive"),
        *("expected one of fail, warn, got 'wran'", "did you mean `warn`?"),
    ),
    "bounds": (
        *("epochs: 2", "warmup_ratio: 2", "11:19 stages[0].warmup_ratio"),
        *("expected a number of at least 0 and below 1, got 2", None),
    ),
    "list": (
        *("- quantize: int8", "- quantize: int8\n    ignore: attention", "14:13 stages[2].ignore"),
        *("expected a list of strings, got 'attention'", None),
    ),
    "empty list": (
        *("baseline: teacher", "evaluate: {latency: {batch_sizes: []}}", "14:35 evaluate.latency.batch_sizes"),
        *("expected a list of whole numbers (1 or more), got a list", None),
    ),
    "split": (
        *("source: rows.csv", "source: rows.csv\n  splits: {trian: 1.0}", "8:12 data.splits.trian"),
        *("unknown key `trian`", "expected 'train', 'validation', 'calibration' or 'evaluation'"),
    ),
    "select": (
        *("alias: production", "alias: production\n  select: sped", "24:11 promote.select"),
        *("nothing measures `sped`", "known: accuracy, latency, macro_f1, matthews, peak_memory, size"),
    ),
    "select is needed": (
        *("- quantize: int8", "- quantize: int8\n  - export: onnx\n    from: teacher\n    name: b", "26:3 promote"),
        *("several leaves could pass: `int8`, `b`", "choose the best: `select: METRIC`"),
    ),
    "version": (
        *("version: 1", "version: 2", "1:10 version"),
        *("this optimize reads recipes of version 1", "a newer one may be needed"),
    ),
    "no version": ("version: 1\n", "", "1:1", "the key `version` is missing", "begin with `version: 1`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_message_with_its_place(folder: Path, name: str) -> None:
    old, new, where, message, hint = MISTAKES[name]
    found = only(mistakes(folder, edit(old, new)))
    assert (found.message, found.hint) == (message, hint)
    assert f"{found.line}:{found.column} {found.path}".startswith(where)
    assert found.source_line == edit(old, new).splitlines()[found.line - 1]


def test_every_mistake_is_reported_at_once(folder: Path) -> None:
    text = TEXT
    for old, new, _, _, _ in (MISTAKES[name] for name in ("unknown key", "method", "baseline", "direction", "select")):
        text = text.replace(old, new)
    found = mistakes(folder, text, ("gates.7.min=1",))
    assert [item.message for item in found] == [
        "unknown key `epoch`",
        "`export` has no method `onxx`",
        "no stage is named `techer`",
        "`max_increase` makes no sense for `accuracy`: more is better",
        "nothing measures `sped`",
        "there is no number 7 here: 2 in all, counted from 0",
    ]


def test_an_unknown_task_brings_no_follow_ups(folder: Path) -> None:
    text = edit("task: text-classification", "task: txt").replace("source: rows.csv", "source: rows.csv\n  image: x")
    assert only(mistakes(folder, text)).path == "model.task"


def test_missing_files_are_found(folder: Path) -> None:
    found = mistakes(folder, TEXT.replace("./model", "./modell").replace("rows.csv", "row.csv"))
    assert [(item.line, item.path) for item in found] == [(4, "model.source"), (7, "data.source")]


def test_missing_files_of_splits_are_found(folder: Path) -> None:
    splits = "splits: {train: rows.csv, validation: rows.csv, calibration: other/rows.csv, evaluation: rows.csv}"
    found = only(mistakes(folder, edit("source: rows.csv", splits)))
    assert (found.line, found.path) == (7, "data.splits.calibration")


def test_a_mapping_has_the_same_mistakes_without_lines(pico_recipe: dict[str, Any]) -> None:
    pico_recipe["stages"][0]["epoch"] = 1
    pico_recipe["data"][1] = "x"
    pico_recipe["gates"][0]["max_ratio"] = float("nan")
    pico_recipe["evaluate"]["metrics"] = {"accuracy"}
    with pytest.raises(RecipeError) as caught:
        load(pico_recipe)
    found = {item.path: item for item in caught.value.diagnostics}
    assert found.keys() == {"stages[0].epoch", "data", "gates[0].max_ratio", "evaluate.metrics"}
    assert {item.location for item in found.values()} == {"<recipe>"}
    assert found["stages[0].epoch"].hint == "did you mean `epochs`?"
    assert "stages[0].epoch" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="can't be read"):
            load(path)


# Methods of others


class PairConfig(Block):
    teacher: str | None = None
    """A stage."""


@pytest.fixture
def more_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantize: pair` with two back ends for ONNX, one for transformers; `distill: pupil` reads another stage."""

    def entry(verb: str, method: str, backend: str | None, takes: str, **more: Any) -> stages.Entry:
        return stages.Entry(verb, method, __name__, (takes,), takes, "For a test.", backend, **more)

    extra = (
        entry("quantize", "pair", "one", "onnx"),
        entry("quantize", "pair", "two", "onnx"),
        entry("quantize", "pair", "three", "transformers"),
        entry("distill", "pupil", None, "transformers", reads=("teacher",)),
        entry("prune", "absent", None, "onnx", libraries=("no-such-library",), extra="pruning"),
        entry("prune", "lacking", None, "onnx", libraries=("no-such-library",)),
    )
    known = stages.entries()
    monkeypatch.setattr(stages, "entries", lambda: known + extra)
    monkeypatch.setattr(sys.modules[__name__], "Config", PairConfig, raising=False)


@pytest.mark.usefixtures("more_stages")
def test_the_back_end_follows_the_format_or_is_asked_for(folder: Path) -> None:
    found = only(mistakes(folder, edit("- quantize: int8", "- quantize: pair\n    name: int8")))
    assert (found.message, found.hint) == (
        "several back ends could do this",
        "choose one: `backend: one`, `backend: two`",
    )
    chosen = load(write(folder, edit("- quantize: int8", "- {quantize: pair, name: int8, backend: two}")))
    assert chosen.stages[2].entry.backend == "two"
    assert load(chosen.document(), base=folder).digest == chosen.digest
    text = edit("  - export: onnx\n", "  - quantize: pair\n  - export: onnx\n    from: teacher\n")
    forked = load(write(folder, text + "  select: size\n"))
    assert forked.stages[1].entry.backend == "three"
    wrong = edit("- quantize: int8", "- {quantize: pair, name: int8, backend: three}")
    assert only(mistakes(folder, wrong)).message == "`quantize: pair` takes transformers, but stage `onnx` gives onnx"


@pytest.mark.usefixtures("more_stages")
def test_a_teacher_is_an_earlier_stage_and_no_leaf(folder: Path) -> None:
    pupil = "  - distill: pupil\n    from: source\n    teacher: teacher\n  - export: onnx\n"
    recipe = load(write(folder, edit("  - export: onnx\n", pupil).replace("baseline: teacher\n", "")))
    assert [stage.name for stage in recipe.leaves] == ["int8"]
    found = only(mistakes(folder, edit("  - export: onnx\n", pupil.replace("teacher: teacher", "teacher: int8"))))
    assert (found.path, found.message) == ("stages[1].teacher", "no earlier stage is named `int8`")


@pytest.mark.usefixtures("more_stages")
@pytest.mark.parametrize(
    ("method", "command"),
    [("absent", 'pip install "optimize-workbench[pruning]"'), ("lacking", "pip install no-such-library")],
)
def test_a_missing_library_names_the_command(folder: Path, method: str, command: str) -> None:
    found = only(mistakes(folder, edit("- quantize: int8", f"- prune: {method}\n    name: int8")))
    assert found.message == f"`prune: {method}` needs no-such-library, which is not installed"
    assert found.hint == command


# Gates of a file


def test_gates_of_a_file_replace_those_of_the_recipe(folder: Path) -> None:
    recipe = load(write(folder, TEXT))
    assert (with_gates(recipe, None, stages=("candidate", "other"), baseline="other").gates) == ()
    path = folder / "gates.yaml"
    path.write_text("gates:\n  - metric: matthews\n    max_drop: 0.1\n    on: candidate\n    over: other\n")
    changed = with_gates(recipe, path, stages=("candidate", "other"), baseline="other")
    assert [gate.metric for gate in changed.gates] == ["matthews"]
    assert changed.evaluate.metrics == ("accuracy", "matthews")
    assert changed.promote is None
    path.write_text(
        "gates:\n  - metric: accuracy\n    max_dorp: 0.1\n"
        "  - {metric: size, min: 1}\n  - {metric: size, max: 1, on: x}\n"
    )
    with pytest.raises(RecipeError) as caught:
        with_gates(recipe, path, stages=("candidate", "other"), baseline="other")
    assert [(item.line, item.path) for item in caught.value.diagnostics] == [
        (3, "gates[0].max_dorp"),
        (4, "gates[1].min"),
        (5, "gates[2].on"),
    ]


# The schema for editors


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


def test_the_schema_takes_what_load_takes(validator: Any, folder: Path, pico_recipe: dict[str, Any]) -> None:
    from optimize.recipe import reader

    for path in QUICKSTART.parent.glob("*.yaml"):
        validator.validate(reader.read(path).value)
    validator.validate(pico_recipe)
    for recipe in (load(QUICKSTART), load(pico_recipe), load(write(folder, TEXT))):
        validator.validate(recipe.document())


@pytest.mark.parametrize(
    "override",
    [
        *("stages.0.epoch=1", "stages.0.epochs=fast", "stages.0.distill=finetun", "stages.0={name: x}"),
        *("data.lable=x", "model.tsk=x", "gates.0.max_dorp=1", "gates.0.min=1", "evaluate.latency.rounds=0"),
        *("stages.1.name=../x", "version=2", "nme=x", "promote.alias=a/b", "data.splits.trian=0.5"),
    ],
)
def test_the_schema_refuses_what_load_refuses(validator: Any, override: str) -> None:
    from optimize.recipe import reader
    from optimize.recipe.overrides import override as apply_override

    text = reader.read(QUICKSTART)
    apply_override(text, [override], env=False)
    assert not validator.is_valid(text.value)
    with pytest.raises(RecipeError):
        load(QUICKSTART, [override])


def test_every_key_of_the_schema_is_described(validator: Any) -> None:
    bare = []

    def walk(node: Any, trail: str) -> None:
        if isinstance(node, dict):
            properties = node.get("properties", {})
            # Under `if`, `then` and `oneOf` keys are named again, to tell cases apart.
            if not any(part in trail for part in ("/if", "/then", "/oneOf")):
                bare.extend(f"{trail}/{key}" for key, value in properties.items() if "description" not in value)
            for key, value in node.items():
                walk(value, f"{trail}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{trail}/{index}")

    walk(validator.schema, "")
    assert not bare


# Speed


def test_loading_is_fast_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "onnx", "onnxruntime", "scipy", "pyarrow", "numpy")
    code = (
        "import sys, optimize.recipe as r; "
        f"r.load({str(QUICKSTART)!r}); print([name for name in {heavy!r} if name in sys.modules])"
    )
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - before < 5, "0.25 s when quiet; the benchmark holds the real bound"


def test_a_recipe_is_immutable(folder: Path) -> None:
    recipe = load(write(folder, TEXT))
    with pytest.raises(AttributeError):
        recipe.name = "other"  # type: ignore[misc]
    with pytest.raises(KeyError):
        recipe.stage("nobody")
    assert recipes.SOURCE == "source"


def test_gates_and_stages_know_where_they_stand() -> None:
    lines = QUICKSTART.read_text(encoding="utf-8").splitlines()
    recipe = load(QUICKSTART, ["gates.1.min_speedup=1.4"], env=False)
    starts = {
        kind: [n for n, line in enumerate(lines, 1) if re.match(kind, line)] for kind in ("  - metric", "  - [deq]")
    }
    assert [gate.location for gate in recipe.gates] == [f"{QUICKSTART}:{line}:5" for line in starts["  - metric"]]
    assert [stage.location for stage in recipe.stages] == [f"{QUICKSTART}:{line}:5" for line in starts["  - [deq]"]]
    assert len(recipe.gates) == len(recipe.stages) == 3
    first = recipe.gates[0]
    assert first.model_copy(update={"on": "int8"}).location == first.location, "a gate that is judged again"


def test_a_place_is_no_part_of_a_recipe() -> None:
    recipe = load(QUICKSTART, env=False)
    written = load(recipe.document(), env=False)
    assert written.digest == recipe.digest
    assert {gate.location for gate in written.gates} == {stage.location for stage in written.stages} == {None}
