"""Export to a program of torch.export: same answers, same bytes, nothing pickled, and machine code where wanted."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import optimize
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import EvaluationError, SourceError, StageError
from optimize.export import torch_export
from optimize.export.answering import Parent, answering
from optimize.export.torch_export import Config, run
from optimize.runtimes import aot_inductor, transformers
from optimize.runtimes.torch_export import open as open_program
from optimize.runtimes.torch_export import parameters


@pytest.fixture(scope="module")
def exported(pico_source: Artifact, new_context: Callable[..., Context]) -> Artifact:
    return run(pico_source, Config(), new_context())


def test_the_file_serves_without_us(exported: Artifact, pico_source: Artifact) -> None:
    program = torch.export.load(exported.path / "model.pt2").module()
    model = transformers.open(pico_source.path, 1).model
    for ids in (torch.tensor([[2, 7, 3]]), torch.tensor([[2, 7, 9, 3, 0], [2, 8, 3, 0, 0], [2, 40, 41, 42, 3]])):
        inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": (ids > 0).long()}
        given = program(**{name: inputs[name] for name in _inputs(exported)})
        np.testing.assert_allclose(given["logits"].detach(), model(**inputs).logits.detach(), atol=1e-6)
    assert exported.details["checked_batches"] == [1, 1, 7, 33]


def _inputs(exported: Artifact) -> list[str]:
    with zipfile.ZipFile(exported.path / "model.pt2") as archive:
        return json.loads(archive.read("model/extra/optimize.json"))["inputs"]


def test_it_answers_in_its_runtime(exported: Artifact, pico_source: Artifact) -> None:
    ours = optimize.Model(exported, threads=1).predict(["a fine film", "dull"])
    theirs = optimize.Model(pico_source, threads=1).predict(["a fine film", "dull"])
    assert ours[0]["score"] == pytest.approx(theirs[0]["score"], abs=1e-5)
    assert parameters(exported.path) == transformers.parameters(pico_source.path)
    with pytest.raises(EvaluationError, match="can't take these inputs"):
        open_program(exported.path, 1).run({})


def test_the_bytes_are_the_same_again_and_hold_no_path(
    exported: Artifact, pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    assert run(pico_source, Config(), new_context()).digest == exported.digest
    content = (exported.path / "model.pt2").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(torch_export.__file__).parent).encode() not in content


def test_a_foreign_folder_is_a_program_to_trust(exported: Artifact) -> None:
    with pytest.raises(SourceError, match="holds a program of torch_export"):
        optimize.load(exported.path)
    assert optimize.load(exported.path, trust_remote_code=True, threads=1).predict(["good"])


@pytest.mark.parametrize("record", ["data/sample_inputs/model.pt", "data/weights/model_weights_config.json"])
def test_a_pickle_in_the_file_is_refused(exported: Artifact, tmp_path: Path, record: str) -> None:
    with zipfile.ZipFile(exported.path / "model.pt2") as whole, zipfile.ZipFile(tmp_path / "model.pt2", "w") as other:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith(record):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true') or b"cos\nsystem\n"
                assert content != whole.read(name)
            other.writestr(name, content)
    with pytest.raises(EvaluationError, match="could run code when loaded"):
        open_program(tmp_path, 1)


class Fixed(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.float() @ torch.ones(5, 2)


class Deciding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Identity()
        self.gate.forward = lambda x: x * 2 if x.sum() > 3 else x  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.gate(input_ids).float()


def program_of(module: torch.nn.Module) -> torch.export.ExportedProgram:
    sample = {"input_ids": torch.ones(3, 5, dtype=torch.int64)}
    return torch_export._program(Parent(module, answering(module, ("input_ids",), by_name=False), sample, sample, None))  # type: ignore[arg-type]


def test_a_size_that_the_code_fixes_is_an_error() -> None:
    with pytest.raises(StageError, match="takes axis 1 of input_ids for the fixed size 5"):
        program_of(Fixed())


def test_a_decision_by_numbers_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(StageError, match=r"can't be exported \(in gate.*\)") as caught:
        program_of(Deciding())
    assert "decides by a size or by numbers" in str(caught.value.hint)


def test_without_a_compiler_it_says_so_at_once(
    pico_source: Artifact, new_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(StageError, match="needs a C\\+\\+ compiler") as caught:
        run(pico_source, Config(aot_inductor=True), new_context())
    assert "g++" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_machine_code_answers_the_same_and_is_kept(
    pico_source: Artifact,
    new_context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path))
    result = run(pico_source, Config(aot_inductor=True), new_context())
    assert result.details["max_difference"] < 1e-5
    assert result.files.keys() == {"config.json", "model.pt2", "tokenizer.json", "tokenizer_config.json"}
    (package,) = tmp_path.glob("aot_inductor/*.pt2")
    monkeypatch.setattr(aot_inductor, "_compile_aside", None)  # not again
    assert optimize.Model(result, threads=2).predict(["a fine film"])
    assert [path.suffix for path in package.parent.iterdir()] in ([".pt2", ".lock"], [".lock", ".pt2"])
