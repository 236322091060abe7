"""The contract of the command line: exit codes, standard output, what is imported when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from optimize import cli, errors
from optimize.artifact import Artifact
from optimize.work import Work

CALL = [sys.executable, "-c", "from optimize.cli import main; main()"]
HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "datasets", "pyarrow", "scipy", "numpy", "rich", "yaml"}
HEAVY |= {"sqlalchemy", "sqlite3", "mlflow", "tensorboard", "wandb"}
VERBS = (
    *("init", "validate", "plan", "apply", "compare", "promote", "rollback"),
    *("registry", "store", "get", "stages", "schema", "doctor", "harness", "sensitivity"),
    *("report", "render", "comment", "gate", "push", "pull", "history", "track"),
)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Optimize = Callable[..., Done]


@pytest.fixture
def optimize(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Iterator[Optimize]:
    """Runs a command line in this process, in an empty folder with a work folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return Done(stopped.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    with mock.patch.dict(os.environ, {"OPTIMIZE_WORK": str(work.root)}):
        yield run


@pytest.fixture
def recipe(pico_recipe: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(pico_recipe), encoding="utf-8")
    return file


def imported_by(*arguments: str) -> set[str]:
    script = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr))\n"
        "from optimize.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stderr.split())


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_imports_nothing_heavy(optimize: Optimize) -> None:
    shown = optimize("--help")
    assert shown.code == 0
    assert not [verb for verb in VERBS if f"\n  {verb} " not in shown.out]
    assert not imported_by("--help") & HEAVY


def test_validate_imports_no_torch(recipe: Path) -> None:
    assert not imported_by("validate", str(recipe)) & (HEAVY - {"yaml"})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(optimize: Optimize, verb: str) -> None:
    shown = optimize(verb, "--help")
    assert shown.code == 0
    assert f"Usage: optimize {verb}" in shown.out


def test_version(optimize: Optimize) -> None:
    from importlib.metadata import version

    assert optimize("--version").out == f"optimize {version('optimize-workbench')}\n"


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [["validat"], ["validate"], ["apply", "--zz"], ["rollback", "nonsense"], ["get", "x"]])
def test_a_wrong_command_line_is_2(optimize: Optimize, line: list[str]) -> None:
    done = optimize(*line)
    assert (done.code, done.out) == (2, "")
    assert "Usage: optimize" in done.err
    done = optimize(*line, "--json")
    assert done.code == 2
    assert done.json["error"]["type"] == "UsageError"


def test_mistakes_in_a_recipe(optimize: Optimize, recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8").replace("epochs", "epocs").replace("max_ratio", "max_ration")
    recipe.write_text(text, encoding="utf-8")
    shown = {style: optimize("validate", recipe, "--output-format", style) for style in ("full", "concise", "github")}
    assert {done.code for done in shown.values()} == {2}
    assert "^" in shown["full"].out
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "epocs" in line)
    assert any(f"recipe.yaml:{line}:" in one and "epochs" in one for one in shown["concise"].out.splitlines())
    assert f"line={line}," in shown["github"].out
    for arguments in (["--json"], ["--output-format", "json"]):
        for verb in ("validate", "plan", "apply"):
            done = optimize(verb, recipe, *arguments)
            assert done.code == 2
            assert done.json["error"]["type"] == "RecipeError"
            assert line in [one["line"] for one in done.json["error"]["diagnostics"]]


def test_a_valid_recipe(optimize: Optimize, recipe: Path) -> None:
    done = optimize("validate", recipe)
    assert (done.code, done.out) == (0, "")
    assert "distill.finetune -> export.onnx -> quantize.int8" in done.err
    plain = optimize("validate", recipe, "--json").json
    changed = optimize("validate", recipe, "--set", "stages.0.epochs=2", "--json").json
    assert plain["error"] is None
    assert plain["digest"] != changed["digest"]


def test_a_user_never_sees_a_traceback(optimize: Optimize, recipe: Path, work: Work) -> None:
    with mock.patch("optimize.planning.plan", side_effect=ZeroDivisionError("nobody thought of this")):
        done = optimize("plan", recipe)
        assert done.code == 4
        assert done.out == ""
        assert done.err.startswith("unexpected ZeroDivisionError: nobody thought of this\n")
        assert "Traceback" not in done.err
        (log,) = (work.root / "logs").iterdir()
        assert str(log) in done.err
        assert "Traceback" in log.read_text(encoding="utf-8")
        assert optimize("plan", recipe, "--json").json["error"]["type"] == "ZeroDivisionError"
        assert "Traceback" in optimize("--debug", "plan", recipe).err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.StageError("no such layer", stage="int8", hint="another"), 4),
        (errors.PromotionRefused("no verdict"), 1),
        (errors.RecipeError("no head"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_have_their_exit_codes(optimize: Optimize, recipe: Path, error: BaseException, code: int) -> None:
    with mock.patch("optimize.engine.apply", side_effect=error):
        done = optimize("apply", recipe)
        assert (done.code, done.out) == (code, "")
        assert "Traceback" not in done.err
        assert done.err.count("\n") <= 2
        document = optimize("apply", recipe, "--json").json
        assert document["error"]["type"] == type(error).__name__
        assert set(document["error"]) >= {"type", "message", "stage", "location"}


def test_text_cannot_command_the_terminal(optimize: Optimize, recipe: Path) -> None:
    error = errors.StageError("\x1b]0;owned\x07 [red]name[/red] \N{RIGHT-TO-LEFT OVERRIDE}", stage="int8")
    with mock.patch("optimize.engine.apply", side_effect=error):
        shown = optimize("apply", recipe).err
    assert "[red]name[/red]" in shown
    assert not {"\x1b", "\x07", "\N{RIGHT-TO-LEFT OVERRIDE}"} & set(shown)


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([*CALL, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3])
def test_json_is_alone_on_standard_output(optimize: Optimize, recipe: Path, code: int) -> None:
    def noisy(*_: object, **__: object) -> SimpleNamespace:
        print("a library prints")
        os.write(1, b"and its C code too\n")
        return SimpleNamespace(document={"schema": 1, "run": "r"}, exit_code=code)

    with mock.patch("optimize.engine.apply", side_effect=noisy):
        done = optimize("apply", recipe, "--json")
    assert done.code == code
    assert done.json == {"schema": 1, "run": "r"}
    assert "a library prints" in done.err
    assert "its C code" in done.err


def test_json_of_a_failed_run_is_its_run_json(optimize: Optimize, recipe: Path, work: Work) -> None:
    with mock.patch(
        "optimize.distill.finetune.run", side_effect=errors.StageError("the loss is not finite", hint="try")
    ):
        done = optimize("apply", recipe, "--json")
    assert done.code == 4
    (file,) = work.runs.glob("*/run.json")
    assert done.json == json.loads(file.read_text(encoding="utf-8"))
    assert done.json["error"]["type"] == "StageError"
    assert done.json["error"]["stage"] == "finetune"
    assert done.json["recipe"] == "pico-sentiment"
    assert "finetune: the loss is not finite" in done.err


def test_work_folder_is_an_option_too(optimize: Optimize, tmp_path: Path, work: Work) -> None:
    promoted(work)
    assert len(optimize("registry", "list", "--json").json["versions"]) == 2
    assert optimize("registry", "list", "--json", "--work", tmp_path / "other").json["versions"] == []


def promoted(work: Work) -> list[str]:
    """Two artifacts in the store, both promoted as `pico@production`, and a third that nobody needs."""
    digests = []
    for number in range(3):
        folder = work.store.staging()
        (folder / "model.bin").write_bytes(bytes([number]) * 100)
        made = Artifact.from_directory(folder, format="onnx", task={"name": "text-classification"})
        record = {"recipe": "pico", "stage": "int8", "inputs": {}, "seconds": 1.0, "size_bytes": 100}
        digests.append(work.store.publish(f"sha256:{number:064x}", made, record).digest)
    for digest in digests[:2]:
        work.registry.promote("pico", "production", digest, verdict="pass", run="r", recipe_digest="sha256:r")
    return digests


def test_registry_and_get(optimize: Optimize, work: Work, tmp_path: Path) -> None:
    assert "Nothing is promoted" in optimize("registry", "list").out
    digests = promoted(work)
    assert "pico@2" in optimize("registry", "list").out
    assert [one["aliases"] for one in optimize("registry", "list", "--json").json["versions"]] == [[], ["production"]]
    assert optimize("rollback", "pico@production", "--json").json["digest"] == digests[0]
    assert [one["action"] for one in optimize("registry", "log", "--json").json["entries"]] == [
        *("promote", "promote"),
        "rollback",
    ]
    assert "rollback pico@1" in optimize("registry", "log").out
    assert optimize("registry", "verify").code == 0

    assert optimize("get", "pico@production", tmp_path / "served").code == 0
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["model.bin"]
    assert (tmp_path / "served" / "model.bin").read_bytes() == bytes(100)
    again = optimize("get", "pico@2", tmp_path / "served", "--json")
    assert (again.code, again.json["error"]["type"]) == (4, "StoreError")
    assert optimize("get", "pico@staging", tmp_path / "x").code == 4


def test_store(optimize: Optimize, work: Work) -> None:
    assert "empty" in optimize("store", "list").out
    digests = promoted(work)
    assert {one["digest"] for one in optimize("store", "list", "--json").json["artifacts"]} == set(digests)
    assert "pico/int8" in optimize("store", "list").out
    assert optimize("store", "verify").code == 0

    # This process holds what it has published; a process that comes later does not.
    assert optimize("store", "gc", "--json").json["removed"] == []


def test_gc_keeps_what_is_promoted(tmp_path: Path) -> None:
    work = tmp_path / "work"
    script = (
        "import sys; from test_cli import promoted; from optimize.work import Work; print(*promoted(Work(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def run(*line: str) -> str:
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    *kept, needless = run(sys.executable, "-c", script, str(work)).split()
    for more in (["--dry-run"], []):
        assert json.loads(run(*CALL, "store", "gc", "--work", str(work), "--json", *more))["removed"] == [needless]
    left = json.loads(run(*CALL, "store", "list", "--work", str(work), "--json"))["artifacts"]
    assert {one["digest"] for one in left} == set(kept)


def test_damage_is_named(optimize: Optimize, work: Work, tmp_path: Path) -> None:
    digests = promoted(work)
    damaged = work.store.open(digests[1]).path / "model.bin"
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * 100)
    for group in ("store", "registry"):
        done = optimize(group, "verify")
        assert done.code == 4
        assert "model.bin" in done.out
        found = optimize(group, "verify", "--json").json
        assert not found["ok"]
        assert len(found["problems"]) == 1
    refused = optimize("get", "pico@production", tmp_path / "served")
    assert refused.code == 4
    assert "model.bin" in refused.err
    assert not (tmp_path / "served").exists()


def test_stages(optimize: Optimize) -> None:
    assert "quantize.int8" in optimize("stages").out
    explained = optimize("stages", "int8", "--json").json["stages"]
    assert {one["stage"] for one in explained} == {"quantize.int8"}
    assert {one["backend"] for one in explained} == {"onnxruntime", "openvino", "torchao", "bitsandbytes"}
    assert all(field["description"] for one in explained for field in one["fields"].values())
    shown = optimize("stages", "distill.finetune").out
    assert "learning_rate" in shown
    assert "https://" in shown
    unknown = optimize("stages", "quantize.int9")
    assert unknown.code == 2
    assert "did you mean 'quantize.int8'?" in unknown.err


def test_schema_is_a_json_schema(optimize: Optimize, recipe: Path) -> None:
    import jsonschema

    schema = optimize("schema").json
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(recipe.read_text(encoding="utf-8")), schema)


def test_a_library_that_exits_is_no_success(optimize: Optimize, recipe: Path) -> None:
    with mock.patch("optimize.distill.finetune.run", side_effect=SystemExit(0)):
        done = optimize("apply", recipe, "--json")
    assert done.code == 4
    assert (done.json["error"]["type"], done.json["error"]["stage"]) == ("StageError", "finetune")


def test_json_is_ascii(optimize: Optimize, recipe: Path) -> None:
    error = errors.StageError("caf\N{LATIN SMALL LETTER E WITH ACUTE} \x9b31m \N{RIGHT-TO-LEFT OVERRIDE}")
    with mock.patch("optimize.engine.apply", side_effect=error):
        done = optimize("apply", recipe, "--json")
    assert done.out.isascii()
    assert done.json["error"]["message"] == error.message


def test_get_takes_what_is_promoted_and_no_folder_of_that_name(optimize: Optimize, work: Work, tmp_path: Path) -> None:
    promoted(work)
    (tmp_path / "pico@production").mkdir()
    assert optimize("get", "pico@production", tmp_path / "served").code == 0
    assert (tmp_path / "served" / "model.bin").read_bytes() == bytes([1]) * 100


def test_a_waiver_that_has_ended_is_said(optimize: Optimize, work: Work, tmp_path: Path) -> None:
    from optimize.registry import Waiver

    *_, digest = promoted(work)
    with mock.patch.object(Waiver, "expired", False):
        work.registry.promote(
            *("pico", "canary", digest),
            verdict="fail",
            run="r",
            recipe_digest="r",
            waiver=Waiver("trial", "2020-01-31"),
        )
    done = optimize("get", "pico@canary", tmp_path / "served")
    assert done.code == 0
    assert "waiver that ended 2020-01-31" in done.err


def test_promote(optimize: Optimize, work: Work) -> None:
    """The verdict is that of the very artifact, and a failed confirmation counts."""
    _, passed, picked = promoted(work)

    def gate(name: str, verdict: str) -> dict[str, str]:
        return {"artifact": name, "verdict": verdict}

    document = {
        **{"schema": 1, "run": "r1", "recipe": "pico", "recipe_digest": "sha256:r", "error": None, "selected": picked},
        "artifacts": [{"name": "passed", "digest": passed}, {"name": "picked", "digest": picked}],
        "gates": [gate("passed", "pass"), gate("picked", "pass")],
        "confirmation": {"gates": [gate("picked", "inconclusive")]},
    }
    (work.runs / "r1").mkdir(parents=True)
    (work.runs / "r1" / "run.json").write_text(json.dumps(document))
    refused = optimize("promote", "latest", "--alias", "staging", "--json")
    assert (refused.code, refused.json["error"]["type"]) == (1, "PromotionRefused")
    done = optimize("promote", "latest", "--alias", "staging", "--artifact", "passed", "--json")
    assert (done.code, done.json["digest"]) == (0, passed)
    waiver = ("--waive", "a trial", "--expires", "2999-12-31")
    assert optimize("promote", "r1", "--alias", "staging", *waiver, "--json").json["digest"] == picked
    assert optimize("promote", "r1", "--alias", "staging", *waiver[:2]).code == 1
    assert optimize("promote", "r1", "--alias", "staging", "--artifact", "none").code == 2
    assert optimize("promote", "r2", "--alias", "staging").code == 2
