"""The whole way on a pico model: build, score, gate, promote; and again, reusing all of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rounds import of_two_rounds

import optimize
from optimize.errors import RecipeError, StageError
from optimize.recipe import load
from optimize.work import Work


@pytest.fixture(scope="module")
def module_work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("engine") / "work")


@pytest.fixture
def quick(pico_recipe: dict[str, Any]) -> dict[str, Any]:
    """Builds and scores answers, but spends no time on clocks."""
    return {**pico_recipe, "evaluate": {"latency": None, "peak_memory": False}}


def test_a_recipe_ends_in_a_promoted_artifact_and_runs_only_once(
    pico_recipe: dict[str, Any], module_work: Work
) -> None:
    recipe = {**pico_recipe, "promote": {"alias": "production"}}
    run = optimize.apply(of_two_rounds(load(recipe)), work=module_work)
    assert run.verdict == "pass"
    assert run.exit_code == 0
    assert run.names == ("finetune", "onnx", "int8")
    assert not any(artifact["cached"] for artifact in run.document["artifacts"])
    assert json.loads((run.directory / "run.json").read_text()) == run.document
    finetune, onnx, int8 = run.document["artifacts"]
    assert int8["size_bytes"] < onnx["size_bytes"]
    assert 0.5 < finetune["scores"]["accuracy"]["value"] <= 1
    assert onnx["scores"]["fidelity"]["parent"]["flips"] == 0
    assert run.document["promoted"]["digest"] == int8["digest"]

    again = optimize.apply(of_two_rounds(load(copy.deepcopy(recipe))), work=module_work)
    assert all(artifact["cached"] for artifact in again.document["artifacts"])
    assert again.document["promoted"] == run.document["promoted"]
    assert [artifact["scores"] for artifact in again.document["artifacts"]] == [
        artifact["scores"] for artifact in run.document["artifacts"]
    ]

    answers = run["int8"].predict(["a great film", "a dull story"])
    assert [set(answer) for answer in answers] == [{"label", "score"}] * 2
    loaded = optimize.load("pico-sentiment@production", work=module_work)
    (answer,) = loaded.predict(["a great film"])
    # Alone in its batch: dynamic quantisation takes the range of activations from the whole batch.
    assert answer["label"] == answers[0]["label"]
    assert answer["score"] == pytest.approx(answers[0]["score"], abs=0.01)
    assert not module_work.store.verify_all()


def test_plan_and_apply_agree(quick: dict[str, Any], work: Work) -> None:
    def planned() -> dict[str, str]:
        return {step.name: step.status for step in optimize.plan(quick, work=work).steps}

    def applied() -> dict[str, str]:
        run = optimize.apply(quick, work=work)
        return {a["name"]: "CACHED" if a["cached"] else "RUN" for a in run.document["artifacts"]}

    assert set(planned().values()) == {"RUN"}
    assert set(applied().values()) == {"RUN"}
    assert planned() == {"source": "CACHED", **applied()}
    quick["stages"][2]["per_channel"] = False
    changed = planned()
    assert changed == {"source": "CACHED", "finetune": "CACHED", "onnx": "CACHED", "int8": "RUN"}
    why = optimize.plan(quick, work=work).steps[-1].why
    assert why == "per_channel: true -> false"
    assert changed == {"source": "CACHED", **applied()}


def test_a_comment_or_an_indent_never_runs_anything_again(
    quick: dict[str, Any], built_work: Work, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(json.dumps(quick))
    second.write_text("# another look\n" + json.dumps(quick, indent=3))
    one, two = (optimize.apply(path, work=built_work) for path in (first, second))
    assert one.document["recipe_digest"] == two.document["recipe_digest"]
    assert all(artifact["cached"] for artifact in two.document["artifacts"])


def test_two_clean_work_folders_give_the_same_digests(quick: dict[str, Any], built_work: Work, tmp_path: Path) -> None:
    here, there = (optimize.apply(quick, work=place).document for place in (built_work, tmp_path / "over/there/work"))
    assert not any(artifact["cached"] for artifact in there["artifacts"])
    one, two = ([artifact["digest"] for artifact in document["artifacts"]] for document in (here, there))
    assert one == two


def test_evaluation_rows_reach_no_stage(
    quick: dict[str, Any], built_work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poison: a stage that asks for them is refused, and the refusal is an error of that stage."""
    from optimize.quantize import int8_onnxruntime

    def peek(artifact: Any, config: Any, context: Any) -> Any:
        return context.data.rows("evaluation")

    monkeypatch.setattr(int8_onnxruntime, "run", peek)
    quick["stages"][2]["per_channel"] = False  # has not run yet
    with pytest.raises(StageError, match="evaluation") as caught:
        optimize.apply(quick, work=built_work)
    assert caught.value.stage == "int8"
    (run,) = built_work.runs.iterdir()
    document = json.loads((run / "run.json").read_text())
    assert document["error"]["stage"] == "int8"
    assert [artifact["name"] for artifact in document["artifacts"]] == ["finetune", "onnx"]


def test_a_failing_gate_promotes_nothing(quick: dict[str, Any], built_work: Work) -> None:
    quick["gates"] = [{"metric": "size", "max_ratio": 0.01}]
    quick["promote"] = {"alias": "production"}
    run = optimize.apply(quick, work=built_work)
    assert (run.verdict, run.exit_code, run.document["promoted"]) == ("fail", 1, None)
    assert "int8" in run.summary
    assert not built_work.registry.list()


def test_a_failure_is_never_stored(quick: dict[str, Any], work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimize.export import onnx

    whole = onnx.run

    def broken(artifact: Any, config: Any, context: Any) -> Any:
        (context.directory / "half.onnx").write_bytes(b"half")
        raise RuntimeError("the exporter fell over")

    monkeypatch.setattr(onnx, "run", broken)
    with pytest.raises(StageError, match="the exporter fell over"):
        optimize.apply(quick, work=work)
    assert not work.store.verify_all()
    assert not list(work.store.root.rglob("half.onnx"))
    monkeypatch.setattr(onnx, "run", whole)
    run = optimize.apply(quick, work=work)
    assert [artifact["cached"] for artifact in run.document["artifacts"]] == [True, False, False]


def test_a_flipped_byte_is_refused_and_named(quick: dict[str, Any], built_work: Work) -> None:
    run = optimize.apply(quick, work=built_work)
    target = Path(run.document["artifacts"][1]["path"]) / "model.onnx"
    target.chmod(0o644)
    damaged = bytearray(target.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    target.write_bytes(damaged)
    assert [problem for problem in built_work.store.verify_all() if "model.onnx" in str(problem)]
    with pytest.raises(optimize.StoreError, match=r"model\.onnx"):
        optimize.apply(quick, work=built_work)
    with pytest.raises(optimize.StoreError, match=r"model\.onnx"):
        optimize.load(run.document["artifacts"][1]["digest"], work=built_work)


def test_a_fresh_head_is_no_baseline(quick: dict[str, Any], work: Work, pico_model: Path, tmp_path: Path) -> None:
    import shutil

    headless = tmp_path / "headless"
    shutil.copytree(pico_model, headless)
    config = json.loads((headless / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (headless / "config.json").write_text(json.dumps(config))
    quick["model"]["source"] = str(headless)
    quick.pop("baseline")
    with pytest.raises(RecipeError, match="baseline"):
        optimize.apply(quick, work=work)
    quick["stages"] = [{"export": "onnx"}]
    with pytest.raises(RecipeError, match="head") as caught:
        optimize.apply(quick, work=work)
    assert "finetune" in str(caught.value)


def test_a_metric_of_the_users_own(
    quick: dict[str, Any], work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick["evaluate"]["metrics"] = ["accuracy", "house_rules:errors"]
    quick["gates"] = [{"metric": "house_rules:errors", "max": 72}]
    with pytest.raises(RecipeError, match="house_rules"):
        optimize.apply(quick, work=work)
    assert work.store.list() == []  # said before anything ran
    (tmp_path / "house_rules.py").write_text(
        "def errors(outputs, targets):\n"
        "    return float((outputs.argmax(axis=1) != targets).sum())\n"
        "errors.higher_is_better = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = optimize.apply(quick, work=work)
    scores = run.document["artifacts"][-1]["scores"]
    assert scores["house_rules:errors"]["value"] == pytest.approx(72 * (1 - scores["accuracy"]["value"]))
    assert run.verdict == "pass"


def test_a_chain_forks(quick: dict[str, Any], built_work: Work) -> None:
    quick["stages"].append({"quantize": "int8", "name": "per-tensor", "from": "onnx", "per_channel": False})
    quick["promote"] = {"alias": "production", "select": "accuracy"}
    quick["gates"] = [{"metric": "size", "max_ratio": 1.5}]
    run = optimize.apply(quick, work=built_work)
    assert run.names == ("finetune", "onnx", "int8", "per-tensor")
    assert {gate["artifact"] for gate in run.document["gates"]} == {"int8", "per-tensor"}
    picked = run.document["confirmation"]["artifact"]
    assert {gate["artifact"] for gate in run.document["confirmation"]["gates"]} == {picked}
    assert run.document["promoted"]["digest"] == run[picked].artifact.digest


def test_the_leaf_that_others_are_compared_with_may_be_picked(quick: dict[str, Any], built_work: Work) -> None:
    quick["stages"].append({"quantize": "int8", "name": "per-tensor", "from": "onnx", "per_channel": False})
    quick["promote"] = {"alias": "production", "select": "size"}
    quick["gates"] = [{"metric": "size", "max_ratio": 1.5}, {"metric": "size", "max_ratio": 9, "over": "per-tensor"}]
    run = optimize.apply(quick, work=built_work)
    assert run.document["confirmation"]["artifact"] == "per-tensor"
    assert [gate["over"] for gate in run.document["confirmation"]["gates"]] == ["finetune"]
    assert run.document["promoted"]["digest"] == run["per-tensor"].artifact.digest


def test_a_promotion_that_no_gate_could_allow_is_a_mistake(quick: dict[str, Any], work: Work) -> None:
    quick["gates"] = [{"metric": "size", "max_ratio": 9, "on": "onnx"}]
    quick["promote"] = {"alias": "production"}
    with pytest.raises(RecipeError, match="no gate judges"):
        optimize.apply(quick, work=work)


def test_overrides_of_a_loaded_recipe(quick: dict[str, Any], work: Work) -> None:
    planned = optimize.plan(load(quick), work=work, overrides=["stages.finetune.epochs=2"])
    assert planned.recipe.document()["stages"][0]["epochs"] == 2


def test_rows_with_labels_in_another_order_are_refused(
    pico_recipe: dict[str, Any], pico_model: Path, work: Work, tmp_path: Path
) -> None:
    pico_recipe["data"]["labels"] = ["positive", "negative"]
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(pico_recipe))
    with pytest.raises(optimize.SourceError, match="another order"):
        optimize.compare(pico_model, pico_model, work=work, recipe=file)


def test_a_run_that_can_not_be_written_says_so(work: Work) -> None:
    from optimize.run import Clock, recording

    work.root.mkdir(parents=True)
    work.runs.write_text("in the way")
    with pytest.raises(optimize.StoreError, match=r"run\.json"), recording(work, None, {"run": "r"}, {}, Clock()):  # type: ignore[arg-type]
        pass


def test_a_run_that_ended_early_does_not_give_up_what_was_there(work: Work) -> None:
    from optimize.run import newest_digests

    def write(run: str, digest: str | None, **more: Any) -> None:
        artifacts = [{"digest": digest, "parent": None}] if digest else []
        document = {"schema": 1, "run": run, "recipe": "r", "error": None, "artifacts": artifacts, **more}
        (work.runs / run).mkdir(parents=True)
        (work.runs / run / "run.json").write_text(json.dumps(document))

    write("1", "old")
    write("2", "whole")
    write("3", "half", error={"message": "m"})
    write("4", None, error={"message": "m"})
    write("5", "compared", compared={})
    (work.runs / "6").mkdir()
    (work.runs / "6" / "run.json").write_text("[]")
    assert newest_digests(work) == {"whole", "half", "compared"}
