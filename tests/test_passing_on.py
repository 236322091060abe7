"""What happens to a run when it is over: it goes into the history and to the trackers, and neither changes a thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize import cli, engine
from optimize.errors import EvaluationError, OptimizeError
from optimize.history import VARIABLE, open_history
from optimize.history.query import Filters, runs, trend
from optimize.progress import Progress
from optimize.run import recipe_of
from optimize.work import Work

TRACK = [{"to": "tensorboard", "timeout_seconds": 280}, {"to": "mlflow", "timeout_seconds": 280}]


class Heard(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.finished: dict[str, str] = {}

    def finish(self, name: str, *, seconds: float, cached: bool = False, text: str = "") -> None:
        self.finished[name] = text

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(f"{name}: {message}")


@pytest.fixture(autouse=True)
def _trackers_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's server is down."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def recipe(pico_recipe: dict[str, Any]) -> dict[str, Any]:
    """One short training, of which nothing is timed."""
    stages = [{"distill": "finetune", "epochs": 2, "batch_size": 8, "threads": 1}]
    evaluate = {"latency": None, "peak_memory": False, "fidelity": False}
    return {**pico_recipe, "stages": stages, "baseline": "source", "evaluate": evaluate, "track": TRACK}


def listed(work: Work) -> list[dict[str, Any]]:
    with open_history(work, tell=pytest.fail) as found:
        return found.read(lambda session: runs(session, Filters()))


def test_a_run_and_the_same_again(recipe: dict[str, Any], work: Work) -> None:
    heard = Heard()
    run = optimize.apply(recipe, work=work, progress=heard)
    assert (run.verdict, run.exit_code) == ("pass", 0)
    (warning,) = heard.warnings
    assert warning.startswith("track mlflow: mlflow did not take the run: MlflowException")
    board = Path(heard.finished["track tensorboard"])
    assert board == work.root / "tensorboard" / "pico-sentiment" / run.document["run"]
    curve = (run.directory / "logs" / "finetune" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [(told["step"], told["loss"]) for line in curve if "loss" in (told := json.loads(line))]
    assert [step for step, _ in losses] == [10, 20, 30]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sent = EventAccumulator(str(board)).Reload()
    assert [(one.step, one.value) for one in sent.Scalars("finetune/training.loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    accuracy = run.document["artifacts"][-1]["scores"]["accuracy"]["value"]
    assert sent.Scalars("finetune/accuracy")[0].value == pytest.approx(accuracy)
    assert recipe_of(run.directory).track == (), "what is compared later is not sent as well"

    untracked = {key: value for key, value in recipe.items() if key != "track"}
    again = optimize.apply(untracked, work=work)
    assert again.document["recipe_digest"] == run.document["recipe_digest"]
    assert [one["digest"] for one in again.document["artifacts"]] == [
        one["digest"] for one in run.document["artifacts"]
    ]
    assert all(one["cached"] for one in again.document["artifacts"])
    assert [one["run"] for one in listed(work)] == [again.document["run"], run.document["run"]]
    with open_history(work, tell=pytest.fail) as found:
        (series,) = found.read(lambda session: trend(session, Filters(artifact="finetune"), "accuracy"))
    assert [point["value"] for point in series["points"]] == [accuracy, accuracy]


def test_a_run_that_fails_is_passed_on_as_well(recipe: dict[str, Any], work: Work) -> None:
    heard = Heard()
    recipe["evaluate"]["metrics"] = ["nowhere:metric"]
    recipe["track"] = TRACK[:1]
    with pytest.raises(OptimizeError) as caught:
        optimize.apply(recipe, work=work, progress=heard)
    (one,) = listed(work)
    assert (one["verdict"], one["exit_code"], one["error"]) == (None, caught.value.exit_code, caught.value.message)
    assert list(heard.finished) == ["track tensorboard"]


def test_whoever_interrupts_a_run_waits_for_no_tracker(
    recipe: dict[str, Any], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    heard = Heard()
    monkeypatch.setattr(engine, "carry_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimize.apply(recipe, work=work, progress=heard)
    (one,) = listed(work)
    assert one["exit_code"] == 130
    assert (heard.finished, heard.warnings) == ({}, [])


@pytest.mark.parametrize("code", [0, 4])
def test_the_exit_code_stays_what_it_is(
    recipe: dict[str, Any], work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, code: int
) -> None:
    def carried_out(*_: Any, **__: Any) -> None:
        if code:
            raise EvaluationError("can't be measured")

    monkeypatch.setattr(engine, "carry_out", carried_out)
    monkeypatch.setenv("OPTIMIZE_WORK", str(work.root))
    work.history.mkdir(parents=True)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**recipe, "track": TRACK[1:]}), encoding="utf-8")
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["apply", str(path), "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == code
    assert json.loads(out)["exit_code"] == code
    assert err.count("history: warning: ") == 1
    assert "unable to open database file" in err
    assert err.count("track mlflow: warning: ") == 1


def test_the_verb_track(work: Work, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from written_runs import RECIPE, document, run_id, write

    monkeypatch.setenv("OPTIMIZE_WORK", str(work.root))
    write(
        work.runs, document(1), {**RECIPE, "track": [{"to": "tensorboard", "folder": "boards", "timeout_seconds": 280}]}
    )
    write(work.runs, document(2))

    def track(*arguments: str) -> tuple[Any, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["track", *arguments])
        return stopped.value.code, *capfd.readouterr()

    code, out, _ = track(run_id(1), "--json")
    where = work.root / "boards" / "pico" / run_id(1)
    assert (code, json.loads(out)["sent"]) == (0, [{"to": "tensorboard", "where": str(where)}])
    assert list(where.glob("events.*"))
    for line, expected, said in (
        (["latest"], 2, "the run's recipe names no tracker"),
        (["latest", "--to", "mlfow"], 2, "did you mean `mlflow`?"),
        (["latest", "--to", "mlflow", "--set", "ur=x"], 2, "did you mean `uri`?"),
        (["latest", "--to", "mlflow", "--to", "wandb", "--set", "uri=x"], 2, "is of one tracker"),
        (["latest", "--set", "uri=x"], 2, "is a setting of `--to`"),
        (["latest", "--to", "mlflow", "--set", "uri=http://ada:s3cr3t@h"], 2, "no place for a password"),
        (["nobody", "--to", "mlflow"], 2, "there is no run"),
        (["latest", "--to", "mlflow", "--set", "timeout_seconds=280"], 4, "mlflow did not take the run"),
    ):
        code, out, err = track(*line)
        assert (code, out) == (expected, "")
        assert said in err
        assert "s3cr3t" not in err
