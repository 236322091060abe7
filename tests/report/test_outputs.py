"""`--report`: what goes where, also of a run that failed, and that no report changes an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from ci_examples import failing, passing, recipe_error

from optimize import cli, engine
from optimize.errors import StageError
from optimize.report.outputs import KINDS, check_kind, write_reports
from optimize.run import Run
from optimize.work import Work

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
RECIPE = "version: 1\nname: sentiment\nmodel: {}\ngates:\n  - metric: size\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMIZE_WORK", str(tmp_path / "work"))
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "GITHUB_WORKSPACE", "GITHUB_TOKEN", "CI_PROJECT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code


def test_every_file_kind_is_written(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        (place / name).write_text("before\n")
        monkeypatch.setenv(name, str(place / name))
    drawn = [name for name, kind in KINDS.items() if kind.draw]
    write_reports(failing(), place / "runs/1", drawn)
    assert json.loads((place / "optimize.json").read_bytes()) == failing()
    assert ET.parse(place / "optimize-junit.xml").getroot().tag == "testsuites"
    assert (place / "optimize.md").read_text().startswith("### ❌ FAIL")
    assert json.loads((place / "gl-code-quality-report.json").read_bytes())[0]["severity"] == "critical"
    assert (place / "GITHUB_STEP_SUMMARY").read_text().startswith("before\n### ❌ FAIL")
    assert f"\nrun={place / 'runs/1/run.json'}\n" in (place / "GITHUB_OUTPUT").read_text()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("::error file=recipes/sentiment.yaml,line=31,")


def test_what_can_not_be_written_is_told_and_the_others_follow(place: Path, capsys: Any) -> None:
    (place / "file").touch()
    write_reports(passing(), None, ["junit=file/x.xml", "github-summary", "github-comment", "markdown=sub/new.md"])
    assert (place / "sub/new.md").exists()
    err = capsys.readouterr().err
    assert err.count("warning: ") == 3
    assert "GITHUB_STEP_SUMMARY is not set" in err


@pytest.mark.parametrize("kind", ["junit", "junit=x.xml", "github", "github-comment", "gitlab-codequality=a=b.json"])
def test_kinds(kind: str) -> None:
    assert check_kind(kind) is None


@pytest.mark.parametrize("kind", ["", "html5", "junit=", "github-comment=x", "=x", "Junit"])
def test_a_wrong_kind_is_said_before_any_work(kind: str, capsys: Any) -> None:
    assert check_kind(kind) is not None
    Path("recipe.yaml").write_text(RECIPE)
    assert run("apply", "recipe.yaml", "--report", kind) == 2
    assert "report" in capsys.readouterr().err or "PATH" in kind or kind.endswith(("=", "x"))


def test_a_recipe_with_mistakes_has_reports_too(capsys: Any) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    assert (
        run(
            "apply",
            "recipe.yaml",
            "--report",
            "junit",
            "--report",
            "markdown",
            "--report",
            "github",
            "--report",
            "json",
        )
        == 2
    )
    errors = ET.parse("optimize-junit.xml").getroot().findall(".//error")
    assert len(errors) > 2
    text = Path("optimize.md").read_text()
    assert text.startswith("### 💥 ERROR · `sentiment`\n")
    assert "`recipe.yaml:5:5`" in text
    assert text.rstrip().endswith("<!-- optimize:sentiment -->")
    assert "::error file=recipe.yaml,line=5,col=5,title=optimize%3A RecipeError::" in capsys.readouterr().err
    assert run("render", "optimize.json", "--report", "markdown") == 0
    assert capsys.readouterr().out == text


def test_a_run_that_fails_or_breaks_has_its_reports(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    Path("recipe.yaml").write_bytes(QUICKSTART.read_bytes())
    monkeypatch.setattr(engine, "apply", lambda *_, **__: Run(failing(), place / "work/runs/1", Work()))
    reports = ("--report", "junit", "--report", "markdown=a.md", "--report", "github-comment", "--json")
    assert run("apply", "recipe.yaml", *reports) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == failing()
    assert "warning: github-comment was not posted" in said.err
    assert Path("a.md").read_text().startswith("### ❌ FAIL")

    def broken(*_: Any, **__: Any) -> None:
        raise StageError("out of memory", stage="int8", location="recipe.yaml:9:3")

    monkeypatch.setattr(engine, "apply", broken)
    assert run("apply", "recipe.yaml", *reports) == 4
    assert Path("a.md").read_text().startswith("### 💥 ERROR in stage `int8` · `minilm-sentiment`")
    assert ET.parse("optimize-junit.xml").getroot().find(".//error[@type='StageError']") is not None


def test_a_finished_run_is_drawn_again(place: Path, capsys: Any) -> None:
    folder = place / "work/runs" / passing()["run"]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(passing()))
    texts = set()
    for reference in ("latest", passing()["run"], str(folder), str(folder / "run.json")):
        assert run("render", reference) == 0
        texts.add(capsys.readouterr().out)
    (text,) = texts
    assert text.startswith("### ✅ PASS")
    assert "\N{REPLACEMENT CHARACTER}" not in text
    assert run("render", "latest", "--report", "junit", "--report", "json=x.json") == 0
    assert capsys.readouterr().out.startswith("<?xml")
    assert json.loads(Path("x.json").read_bytes()) == passing()
    assert run("render", "nothing") == 2


def test_the_comment_verb_posts_or_says_why_not(place: Path, capsys: Any) -> None:
    Path("result.json").write_text(json.dumps(recipe_error()))
    assert run("comment", "result.json", "--github") == 0
    assert "was not posted" in capsys.readouterr().err
    assert run("comment", "result.json") == 2
    Path("result.json").write_text('{"schema": 1}')
    assert run("comment", "result.json", "--github") == 2
