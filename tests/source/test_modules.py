"""Modules of the user's own: their weights are tensors, and nothing else is ever loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimize import runtimes
from optimize.errors import EvaluationError, SourceError
from optimize.examples import convnet
from optimize.source import Local
from optimize.source.folder import load_folder
from optimize.source.image import Image
from optimize.source.modules import ModuleSource

FACTORY = "optimize.examples:convnet"
ARGS = {"classes": 3, "width": 4}


def source(path: Path | None, module: str = FACTORY, args: dict[str, Any] = ARGS) -> ModuleSource:
    return ModuleSource(module, args, Image(size=8), Local(path) if path else None)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return convnet(**ARGS).state_dict()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth", "checkpoint.pt"])
def test_weights_become_safetensors(name: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file, folder = tmp_path / name, tmp_path / "out"
    folder.mkdir()
    if name.endswith("safetensors"):
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if name == "checkpoint.pt" else weights, file)
    source(file).copy_to(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert json.loads((folder / "config.json").read_text()) == {"module": FACTORY, "module_args": ARGS}
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


def test_new_weights_are_the_same_each_time(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        source(None).copy_to(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["fresh"] is True


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["OPTIMIZE_TEST_TRACE"],)


def test_a_pickle_that_does_things_is_refused_and_does_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setenv("OPTIMIZE_TEST_TRACE", str(trace))
    torch.save({"weight": Malicious()}, tmp_path / "weights.pt")
    with pytest.raises(SourceError, match=r"weights.pt holds more than weights"):
        source(tmp_path / "weights.pt").copy_to(_folder(tmp_path))
    assert not trace.exists()


def test_a_whole_module_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(convnet(**ARGS), tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"model.pt holds more than weights"):
        source(tmp_path / "model.pt").copy_to(_folder(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SourceError, match=r"list.pt holds no state dict"):
        source(tmp_path / "list.pt").copy_to(_folder(tmp_path, "second"))


@pytest.mark.parametrize(
    ("module", "args", "told"),
    [
        ("no_such_package_of_nets:make", {}, "No module named 'no_such_package_of_nets'"),
        ("optimize.examples:transformer", {}, "has no attribute 'transformer'"),
        (FACTORY, {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("builtins:dict", {"a": 1}, "gives a dict, and no torch.nn.Module"),
        (FACTORY, {"classes": 5, "width": 4}, "the weights are not those of the module"),
    ],
)
def test_what_makes_no_module(
    module: str, args: dict[str, Any], told: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(SourceError, match=told):
        source(tmp_path / "weights.safetensors", module, args).copy_to(_folder(tmp_path))


def test_the_key_follows_the_code_the_arguments_and_the_weights(
    weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_nets_of_a_test.py").write_text("def make(): pass\n")
    save_file(weights, tmp_path / "weights.safetensors")
    module = "some_nets_of_a_test:make"
    file = tmp_path / "weights.safetensors"
    before = source(file, module).identity
    assert source(file, module).identity == before
    assert str(tmp_path) not in json.dumps(before)
    assert source(file, module, {}).identity != before
    assert source(None, module).identity != before
    (tmp_path / "some_nets_of_a_test.py").write_text("def make(): return None\n")
    assert source(file, module).identity != before


def test_a_folder_names_code_and_runs_none_of_it_untrusted(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    source(None).copy_to(folder)
    trace = tmp_path / "trace"
    config = {"module": "os:mkdir", "module_args": {"path": str(trace)}, "task": "image-classification"}
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(SourceError, match="program of pytorch"):
        load_folder(folder)
    with pytest.raises(EvaluationError, match=r"made by code that its config\.json names"):
        runtimes.get("pytorch").open(folder, 1)
    assert not trace.exists()
    assert load_folder(folder, trust_remote_code=True).task == {"name": "image-classification", "labels": ["a", "b"]}


def _folder(parent: Path, name: str = "out") -> Path:
    (parent / name).mkdir()
    return parent / name
