"""`optimize gate` from end to end, on models that answer as they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import optimize
from optimize import cli
from optimize.errors import EvaluationError, RecipeError, RegistryError, StoreError
from optimize.work import Work

ROWS = 400
GATES: list[dict[str, Any]] = [{"metric": "accuracy", "max_drop": 0.05}, {"metric": "size", "max_ratio": 1.02}]
PRODUCTION = "planted@production"


@pytest.fixture(scope="module")
def project(planting: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return planting.Project(tmp_path_factory.mktemp("project"), ROWS)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "work")


@pytest.fixture
def promote(project: Any, work: Work) -> Callable[..., str]:
    """Promotes a candidate that has lost so many rows; its digest."""

    def make(lost: int = 0, *, into: Work = work) -> str:
        recipe = project.recipe([{"metric": "size", "max": 1e12}], {"lost": right(lost)})
        return str(optimize.apply(recipe, work=into).document["promoted"]["digest"])

    return make


def right(count: int) -> list[int]:
    """So many words that are answered rightly."""
    return [word for word in range(ROWS) if word % 10][:count]


def test_nothing_is_promoted_yet(project: Any, work: Work) -> None:
    run = optimize.gate(project.recipe(GATES, {"lost": right(100)}), against=PRODUCTION, work=work)
    assert run.document["against"] == {
        "ref": PRODUCTION,
        "name": "production",
        "version": None,
        "digest": None,
        "run": None,
        "promoted_at": None,
        "changed": {},
        "since": [],
        "notes": [f"nothing is promoted as {PRODUCTION} yet: the recipe's own gates decide"],
    }
    assert (run.verdict, run.exit_code) == ("fail", 1)
    assert {gate["over"] for gate in run.document["gates"]} == {"plain"}
    assert not work.registry.list()


def test_over_what_is_promoted(project: Any, work: Work, promote: Callable[..., str]) -> None:
    digest = promote(100)
    # Far below the baseline, and just what is promoted.
    run = optimize.gate(project.recipe(GATES, {"lost": right(100)}), against=PRODUCTION, work=work)
    assert (run.verdict, run.exit_code, run.document["promoted"]) == ("pass", 0, None)
    assert {(gate["artifact"], gate["over"]) for gate in run.document["gates"]} == {("candidate", "production")}
    against = run.document["against"]
    assert (against["version"], against["digest"]) == (1, digest)
    assert against["run"] == work.registry.resolve(PRODUCTION).run
    assert {one["what"] for one in against["changed"]["recipe"]} == {
        "gates.accuracy",
        "gates.size.max",
        "gates.size.max_ratio",
    }
    assert [against["changed"][kind] for kind in ("data", "environment", "host")] == [[], [], []]
    assert run.names == ("plain", "candidate", "production")
    (production,) = (one for one in run.document["artifacts"] if one["name"] == "production")
    assert production["digest"] == digest
    assert production["scores"]["accuracy"]["n"] == ROWS
    assert production["stage"] == "quantize.planted"

    worse = optimize.gate(project.recipe(GATES, {"lost": right(160)}), against=PRODUCTION, work=work)
    assert (worse.verdict, worse.exit_code) == ("fail", 1)
    assert "accuracy of candidate is -0.15 from that of production" in worse.summary


def test_what_was_measured_before_takes_no_part(project: Any, work: Work, promote: Callable[..., str]) -> None:
    """Stored answers that flatter the candidate and slander what is promoted are not looked at."""
    promote()
    recipe = project.recipe(GATES, {"lost": right(80)})
    optimize.apply(recipe, work=work, promote=False)
    kept = [path for path in work.scores.rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        path.write_bytes(b"slander")
    assert optimize.gate(recipe, against=PRODUCTION, work=work).verdict == "fail"
    assert {path.read_bytes() for path in kept} == {b"slander"}
    assert not list((work.store.root / "staging").iterdir())


def test_budgets_that_creep(project: Any, work: Work, promote: Callable[..., str]) -> None:
    """Each step loses 3.5 points under a limit of 5; the fourth has lost 10.5 since the first."""
    for lost in (0, 14, 28):
        promote(lost)
    recipe = project.recipe([{"metric": "accuracy", "max_drop": 0.06}], {"lost": right(42)})
    run = optimize.gate(recipe, against=PRODUCTION, work=work)
    assert run.exit_code == 0
    run = optimize.gate(recipe, against=PRODUCTION, since=["production~2"], work=work)
    assert run.exit_code == 1
    assert {gate["over"]: gate["verdict"] for gate in run.document["gates"]} == {
        "production": "pass",
        "production~2": "fail",
    }
    (since,) = run.document["against"]["since"]
    assert (since["ref"], since["name"], since["version"]) == (f"{PRODUCTION}~2", "production~2", 1)
    # Farther back than there is anything: the oldest.
    run = optimize.gate(recipe, against=PRODUCTION, since=["production~5"], work=work)
    assert run.document["against"]["since"] == [since]
    assert "before the first version" in run.document["against"]["notes"][0]


def test_a_runner_starts_empty(project: Any, work: Work, promote: Callable[..., str], tmp_path: Path) -> None:
    remote = str(tmp_path / "remote")
    digest = promote()
    recipe = project.recipe(GATES, {"padding_bytes": 100_000})
    optimize.push(remote=remote, work=work)
    runner = Work(tmp_path / "runner")
    run = optimize.gate(recipe, against=PRODUCTION, remote=remote, work=runner)
    assert runner.store.holds(digest)
    (size,) = (gate for gate in run.document["gates"] if gate["metric"] == "size")
    assert (run.exit_code, size["verdict"], size["over"]) == (1, "fail", "production")
    assert run.document["against"]["changed"]["recipe"]
    # The registry alone names an artifact that is not here.
    bare = Work(tmp_path / "bare")
    bare.registry.log.extend(work.registry.log.files())
    with pytest.raises(StoreError, match="not in the store") as caught:
        optimize.gate(recipe, against=PRODUCTION, work=bare)
    assert "--remote" in str(caught.value.hint)


def test_versions_that_only_the_remote_has_are_compared(
    project: Any, work: Work, promote: Callable[..., str], tmp_path: Path
) -> None:
    remote = str(tmp_path / "remote")
    first, second = promote(), promote(40)
    optimize.push(remote=remote, work=work)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(project.recipe(GATES, {})))
    elsewhere = Work(tmp_path / "elsewhere")
    run = optimize.compare(PRODUCTION, f"{PRODUCTION}~1", recipe=recipe, work=elsewhere, remote=remote)
    assert [one["digest"] for one in run.document["artifacts"]] == [second, first]
    (accuracy,) = (one for one in run.document["comparisons"] if one["metric"] == "accuracy")
    assert accuracy["estimate"] == -40 / ROWS
    again = optimize.compare(second[:19], "planted@1", recipe=recipe, work=Work(tmp_path / "third"), remote=remote)
    assert again.document["comparisons"] == run.document["comparisons"]


def test_an_acknowledged_regression(project: Any, work: Work, promote: Callable[..., str], tmp_path: Path) -> None:
    promote()
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(project.recipe(GATES, {"lost": right(60)})))
    lines = tmp_path / "acknowledged.yaml"
    lines.write_text(
        "version: 1\nacknowledged:\n  - {metric: accuracy, up_to: 0.3, reason: a new tokenizer, expires: 2999-01-01}\n"
    )
    run = optimize.gate(recipe, against=PRODUCTION, work=work)
    assert (run.verdict, run.exit_code) == ("pass", 0)
    (accuracy,) = (gate for gate in run.document["gates"] if gate["metric"] == "accuracy")
    assert accuracy["verdict"] == "fail"
    assert accuracy["acknowledged"]["location"] == f"{lines}:3:5"
    assert run.document["acknowledgements"][0]["state"] == "used"
    assert "1 regression acknowledged until 2999-01-01" in run.summary
    # Promoted under a waiver, and only where the recipe's own gates are kept as well.
    promoted = optimize.gate(recipe, against=PRODUCTION, work=work, promote=True)
    assert promoted.document["promoted"]["version"] == 2
    version = work.registry.resolve(PRODUCTION)
    assert version.waiver is not None
    assert (version.verdict, version.waiver.reason) == ("fail", "a new tokenizer")
    lines.unlink()
    assert optimize.gate(recipe, against=f"{PRODUCTION}~1", work=work).exit_code == 1


def test_what_can_not_be_gated(project: Any, work: Work, promote: Callable[..., str]) -> None:
    recipe = project.recipe(GATES, {})
    for against in ("planted", "production", "a@b@c", "planted@3~1", "planted@"):
        with pytest.raises(RecipeError, match="names no version"):
            optimize.gate(recipe, against=against, work=work)
    with pytest.raises(RegistryError, match="planted@7"):
        optimize.gate(recipe, against="planted@7", work=work)
    with pytest.raises(RecipeError, match="no gates"):
        optimize.gate({**recipe, "gates": [], "promote": None}, against=PRODUCTION, work=work)
    with pytest.raises(RecipeError, match="what to promote to"):
        optimize.gate({**recipe, "promote": None}, against=PRODUCTION, work=work, promote=True)
    promote()
    run = optimize.gate(recipe, against="planted@prodction", work=work)
    assert "did you mean `planted@production`" in run.document["against"]["notes"][0]
    other = {**recipe, "data": {**recipe["data"], "text": "label", "label": "text"}}
    with pytest.raises((EvaluationError, optimize.SourceError)):
        optimize.gate(other, against=PRODUCTION, work=work)


def test_a_gate_is_no_run_to_promote_from(project: Any, work: Work, promote: Callable[..., str]) -> None:
    """Its candidate was held against what is promoted, and perhaps let pass; the recipe's own gates are not in it."""
    from optimize.promotion import promote as promote_later

    promote()
    run = optimize.gate(project.recipe(GATES, {"lost": right(4)}), against=PRODUCTION, work=work)
    assert run.verdict == "pass"
    with pytest.raises(optimize.PromotionRefused, match="against what is promoted"):
        promote_later(run.document["run"], alias="production", work=work)


def test_the_command_says_it(
    project: Any,
    work: Work,
    promote: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTIMIZE_WORK", "")  # `--work` sets it for child processes: put back in the end
    promote()
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(project.recipe(GATES, {"lost": right(80)})))
    with pytest.raises(SystemExit) as ended:
        cli.main(["gate", str(recipe), "--against", PRODUCTION, "--work", str(work.root)])
    out = capfd.readouterr().out
    assert ended.value.code == 1
    assert f"Against {PRODUCTION}: version 1" in out
    assert "FAIL: candidate: accuracy of candidate is -0.2 from that of production" in out
    with pytest.raises(SystemExit) as ended:
        cli.main(["gate", str(recipe), "--against", "planted@staging", "--work", str(work.root), "--json"])
    document = json.loads(capfd.readouterr().out)
    assert (document["against"]["version"], document["exit_code"]) == (None, ended.value.code)
