"""The action and the workflows to copy: they parse, name options there are, and put no stranger's text into a shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from optimize.cli import app
from optimize.report.outputs import KINDS, check_kind

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / "docs/ci").glob("github*.yml"))
GITLAB = ROOT / "docs/ci/gitlab.yml"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def load(file: Path) -> Any:
    # `on` is a key here, not true.
    return yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506


def scripts() -> Iterator[tuple[str, str]]:
    for file in (ACTION, *WORKFLOWS):
        document = load(file)
        jobs = document["jobs"].values() if "jobs" in document else [document["runs"]]
        for job in jobs:
            yield from ((f"{file.name}: {step.get('name')}", step["run"]) for step in job["steps"] if "run" in step)
    yield GITLAB.name, "\n".join(load(GITLAB)["optimize"]["script"])


@pytest.mark.parametrize(("name", "script"), list(scripts()))
def test_a_script_is_sound_and_takes_its_values_from_the_environment(name: str, script: str) -> None:
    assert "${{" not in script, "a value of a stranger's would become part of the script"
    if bash := shutil.which("bash"):
        done = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "script"), list(scripts()))
def test_a_script_names_verbs_options_and_reports_there_are(name: str, script: str) -> None:
    if "optimize " not in script and "/optimize" not in script:
        return
    verbs = set(re.findall(r"optimize\"? (\w+) ", script)) | set(re.findall(r"verb=(\w+)", script))
    if missing := verbs - set(COMMANDS):
        pytest.skip(f"there is no {', '.join(missing)} in this build")
    known = {option for verb in verbs for one in COMMANDS[verb].params for option in (*one.opts, *one.secondary_opts)}
    used = set(re.findall(r"(?<=[\s(])--[a-z]+(?=[\s)])", script)) - {"--quiet"} if verbs else set()
    assert used <= known, used - known
    for kind in re.findall(r"--report ([\w=./-]+)", script):
        assert check_kind(kind) is None, kind


def uses(document: Any) -> Iterator[dict[str, Any]]:
    for job in document["jobs"].values():
        yield from (step for step in job["steps"] if step.get("uses", "").startswith("optimize-workbench/optimize@"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_uses_the_action_as_it_is(file: Path) -> None:
    document, action = load(file), load(ACTION)
    steps = list(uses(document))
    assert steps
    for step in steps:
        assert set(step["with"]) <= set(action["inputs"])
        for kind in step["with"].get("report", "").split():
            assert check_kind(kind) is None, kind
    assert document["permissions"], "of what is not said here the token may have everything"
    for job in document["jobs"].values():
        assert job["timeout-minutes"]


def test_a_job_that_runs_a_fork_s_code_has_no_token_and_the_one_that_has_runs_none() -> None:
    measure, comment = load(ROOT / "docs/ci/github-forks-measure.yml"), load(ROOT / "docs/ci/github-forks-comment.yml")
    assert measure["permissions"] == {"contents": "read"}
    assert not any("token" in step["with"] for step in uses(measure))
    assert "secrets." not in (ROOT / "docs/ci/github-forks-measure.yml").read_text(encoding="utf-8")
    assert list(comment["on"]) == ["workflow_run"]
    assert comment["on"]["workflow_run"]["workflows"] == [measure["name"]]
    assert not any("checkout" in step.get("uses", "") for job in comment["jobs"].values() for step in job["steps"])
    assert all("result" in step["with"] for step in uses(comment))
    for file in (*WORKFLOWS, ACTION):
        assert "pull_request_target" not in load(file).get("on", ())


def test_the_action_hands_on_what_its_step_writes() -> None:
    document = load(ACTION)
    step = next(step for step in document["runs"]["steps"] if step.get("id") == "gate")
    assert "--report github-output" in step["run"]
    for output, told in document["outputs"].items():
        assert told["value"] == f"${{{{ steps.gate.outputs.{output} }}}}"
    for kind in document["inputs"]["report"]["default"].split():
        assert check_kind(kind) is None


def test_the_light_installation_has_what_drawing_imports() -> None:
    """What the second step installs is enough: nothing else is imported to draw a result and post it."""
    import sys

    script = (
        "import sys\n"
        "import optimize.cli\n"
        "import optimize.report.intake, optimize.report.posting, optimize.report.outputs, optimize.report.junit\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    install = next(step["run"] for step in load(ACTION)["runs"]["steps"] if step["name"] == "Install")
    for heavy in ("torch", "transformers", "scipy", "datasets", "onnx", "sqlalchemy", "fsspec"):
        assert heavy not in done.stdout.split()
        assert not re.search(rf'"\$\{{pip\[@\]\}}" numpy .*\b{heavy}\b', install)


def test_the_guide_lists_every_report() -> None:
    guide = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| `([a-z-]+)` \|", guide) == list(KINDS)
    for file in (*WORKFLOWS, GITLAB):
        assert f"ci/{file.name}" in guide
