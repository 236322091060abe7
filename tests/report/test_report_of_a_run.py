"""A real run and its page: written by `apply`, whatever becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.errors import StageError
from optimize.progress import Progress
from optimize.run import Run
from optimize.work import Work


class Told(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def run(pico_model: Path, pico_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One epoch, and an export that answers alike: a fork, gates, and rows that change."""
    recipe = {
        "version": 1,
        "name": "pico-report",
        "model": {"source": str(pico_model), "task": "text-classification"},
        "data": {
            "source": str(pico_csv),
            "text": "text",
            "label": "label",
            "splits": {"train": 0.5, "validation": 0.1, "calibration": 0.1, "evaluation": 0.3},
        },
        "stages": [
            {"export": "onnx"},
            {"distill": "finetune", "from": "source", "epochs": 1, "learning_rate": 2e-3, "threads": 1},
        ],
        "baseline": "source",
        "evaluate": {"latency": None, "peak_memory": False},
        "gates": [{"metric": "size", "max_ratio": 1.5}],
    }
    return optimize.apply(recipe, work=tmp_path_factory.mktemp("report") / "work")


def test_apply_draws_its_page_from_what_lies_beside_it(run: Run, tmp_path: Path) -> None:
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert "Pass" in page
    assert run.document["metrics"]["accuracy"] == {"higher_is_better": True}
    rows = json.loads((run.directory / run.document["sidecars"]["rows"]["path"]).read_bytes())
    assert rows["counts"]["finetune"] == run.document["artifacts"][-1]["scores"]["fidelity"]["baseline"]["flips"] > 0
    assert {row["label"] for row in rows["rows"]} <= {"negative", "positive"}
    assert rows["rows"][0]["columns"]["text"] in page
    # The same folder elsewhere, without the work folder, gives the same page but for the path of the command.
    import shutil

    from optimize.report.html import write

    shutil.copytree(run.directory, tmp_path / "runs" / run.directory.name)
    again = write(tmp_path / "runs" / run.directory.name).read_text(encoding="utf-8")
    assert again.replace(f"{tmp_path.name}/runs", "work/runs") == page


def test_a_run_is_run_again_from_its_own_recipe(run: Run) -> None:
    again = optimize.apply(run.directory / "recipe.json", work=run.work)
    assert again.document["recipe_digest"] == run.document["recipe_digest"]
    assert all(one["cached"] for one in again.document["artifacts"])


def test_rows_stay_out_of_the_files_where_the_recipe_says_so(run: Run) -> None:
    private = optimize.apply(run.directory / "recipe.json", work=run.work, overrides=["evaluate.flips=false"])
    assert not [name for name in private.document["sidecars"] if name == "rows" or name.startswith("flips")]
    assert private.document["artifacts"][-1]["scores"]["fidelity"]["baseline"]["flips"] > 0
    text = json.loads((run.directory / "rows.json").read_bytes())["rows"][0]["columns"]["text"]
    assert not [path for path in private.directory.iterdir() if path.is_file() and text in path.read_text("utf-8")]


def test_a_page_that_cannot_be_drawn_is_told_and_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("optimize.report.html.write", fail)
    told = Told()
    again = optimize.apply(run.directory / "recipe.json", work=run.work, progress=told)
    assert (again.verdict, again.exit_code) == ("pass", 0)
    assert told.warnings == ["report.html could not be drawn (OSError: no space left)"]


def test_a_run_that_fails_has_a_page_that_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise StageError("nothing <works>", hint="another")

    monkeypatch.setattr("optimize.export.onnx.run", broken)
    with pytest.raises(StageError):
        optimize.apply(run.directory / "recipe.json", work=run.work, overrides=["stages.onnx.opset=19"])
    newest = max(Work(run.work.root).runs.iterdir())
    page = (newest / "report.html").read_text(encoding="utf-8")
    assert "nothing &lt;works&gt;" in page
    assert "What to try" in page
