"""Export to TorchScript: same answers, same bytes, nothing of this machine in the file, a word on fixed branches."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optimize
from optimize import recipe
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import EvaluationError, RecipeError, SourceError, StageError
from optimize.export import torchscript
from optimize.export.answering import Parent, answering
from optimize.export.torchscript import Config, run
from optimize.progress import Progress
from optimize.runtimes import transformers
from optimize.runtimes.torchscript import open as open_script
from optimize.runtimes.torchscript import parameters


class Warned(Progress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, stage: str, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def warned() -> Warned:
    return Warned()


@pytest.fixture(scope="module")
def exported(pico_source: Artifact, new_context: Callable[..., Context], warned: Warned) -> Artifact:
    return run(pico_source, Config(), new_context(progress=warned))


def test_the_file_serves_without_us(exported: Artifact, pico_source: Artifact, warned: Warned) -> None:
    program = torch.jit.load(exported.path / "model.pt")
    ids = torch.tensor([[2, 7, 9, 3, 0], [2, 8, 3, 0, 0], [2, 40, 41, 42, 3]])
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": (ids > 0).long()}
    takes = [argument.name for argument in program.forward.schema.arguments[1:]]
    model = transformers.open(pico_source.path, 1).model
    with torch.inference_mode():
        given = program(**{name: inputs[name] for name in takes})
        np.testing.assert_allclose(given["logits"], model(**inputs).logits, atol=1e-6)
    assert exported.details["checked_batches"] == [1, 1, 7, 33]
    assert exported.details["max_difference"] < 1e-5
    assert warned.messages == []  # sizes are asked for on the way, but nothing hangs on them


def test_it_answers_in_its_runtime(exported: Artifact, pico_source: Artifact) -> None:
    ours = optimize.Model(exported, threads=1).predict(["a fine film", "dull"])
    theirs = optimize.Model(pico_source, threads=1).predict(["a fine film", "dull"])
    assert [answer["label"] for answer in ours] == [answer["label"] for answer in theirs]
    assert ours[0]["score"] == pytest.approx(theirs[0]["score"], abs=1e-5)
    assert parameters(exported.path) == transformers.parameters(pico_source.path)
    with pytest.raises(EvaluationError, match="no decoder"):
        open_script(exported.path, 1).decoder(8)
    with pytest.raises(EvaluationError, match="the model wants input_ids"):
        open_script(exported.path, 1).run({})


def test_a_foreign_folder_is_a_program_to_trust(exported: Artifact) -> None:
    with pytest.raises(SourceError, match="holds a program of torchscript"):
        optimize.load(exported.path)
    assert optimize.load(exported.path, trust_remote_code=True, threads=1).predict(["good"])


def test_the_bytes_are_the_same_again_and_hold_no_path(
    exported: Artifact, pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1))  # counts names in this process
    assert run(pico_source, Config(), new_context()).digest == exported.digest
    with zipfile.ZipFile(exported.path / "model.pt") as archive:
        assert not [name for name in archive.namelist() if "debug" in name or "traced_inputs" in name]
    content = (exported.path / "model.pt").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(torchscript.__file__).parent).encode() not in content


def test_another_process_writes_the_same_bytes(
    exported: Artifact, pico_source: Artifact, pico_csv: Path, tmp_path: Path
) -> None:
    code = f"""
from pathlib import Path
from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.export.torchscript import Config, run
from optimize.work import Work
root = Path({str(tmp_path)!r})
task = tasks.get("text-classification")
config = task.Data(source={str(pico_csv)!r}, splits={{"train": 0.5, "validation": 0.2, "evaluation": 0.3}})
data = prepare(config, task, Work(root / "work"), root).for_stages()
for name in ("artifact", "scratch"):
    (root / name).mkdir()
spec = {dict(pico_source.task)!r}
source = Artifact.from_directory(Path({str(pico_source.path)!r}), format="transformers", task=spec)
context = Context(root / "artifact", root / "scratch", task, data, root / "logs")
Path(root / "digest").write_text(run(source, Config(), context).digest)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert (tmp_path / "digest").read_text() == exported.digest
    assert done.stdout == ""
    assert done.stderr == ""


def test_optimised_for_inference_it_answers_the_same(
    pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    assert run(pico_source, Config(optimize_for_inference=True), new_context()).details["max_difference"] < 1e-5
    with pytest.raises(ValueError, match="needs freeze"):
        Config(optimize_for_inference=True, freeze=False)


class Choosy(torch.nn.Module):
    """Decides by a number and by a size, as some models' code does."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = input_ids.float().mean(dim=1, keepdim=True)
        return logits * 2 if input_ids[0, -1] > 0 and input_ids.shape[1] > 3 else logits


def parent_of(module: torch.nn.Module, sample: list[list[int]], other: list[list[int]]) -> Parent:
    tensors = [{"input_ids": torch.tensor(rows)} for rows in (sample, other)]
    return Parent(module, answering(module, ("input_ids",), by_name=False), tensors[0], tensors[1], None)  # type: ignore[arg-type]


def test_a_branch_that_tracing_fixes_is_told_with_its_place() -> None:
    parent = parent_of(Choosy().eval(), [[1, 2, 3, 4, 5]] * 3, [[1, 0]] * 2)
    traced, places = torchscript._program(parent, parent.sample, Config())
    assert any(place.startswith("export/test_torchscript_export.py:") for place in places)
    again, _ = torchscript._program(parent, parent.other, Config())
    assert not torchscript._same(traced, again)


def test_a_script_keeps_its_branches() -> None:
    parent = parent_of(Choosy().eval(), [[1, 2, 3, 4, 5]] * 3, [[1, 0]] * 2)
    script, places = torchscript._program(parent, parent.sample, Config(method="script"))
    assert not places
    for rows in (parent.sample, parent.other):
        torch.testing.assert_close(script(rows["input_ids"]), parent.model(rows["input_ids"]))


class Broken(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(7, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids.float())


def test_a_failure_names_the_layer() -> None:
    parent = parent_of(Broken(), [[1, 2]] * 2, [[1, 2]] * 2)
    with pytest.raises(StageError, match=r"can't be exported \(in inner\): RuntimeError: .*cannot be multiplied"):
        torchscript._program(parent, parent.sample, Config())


def test_a_language_model_is_sent_elsewhere(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    context = replace(new_context(), task=optimize.tasks.get("causal-lm"))
    with pytest.raises(StageError, match="needs its key/value cache"):
        run(pico_source, Config(), context)


def test_a_script_of_a_transformers_model_is_refused_at_validation(pico_recipe: dict[str, Any]) -> None:
    stages = [{"export": "torchscript", "method": "script"}]
    with pytest.raises(RecipeError, match="`method: script` takes pytorch, and not transformers"):
        recipe.load({**pico_recipe, "stages": stages, "baseline": "source"})
