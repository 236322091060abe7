"""A model in somebody's own folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from optimize.errors import OptimizeError, SourceError, StoreError
from optimize.source.folder import load_folder


@pytest.fixture
def folder(pico_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico_model, tmp_path / "mine"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_format_task_and_labels_are_looked_up(folder: Path) -> None:
    artifact = load_folder(folder)
    assert artifact.format == "transformers"
    assert artifact.task == {"name": "text-classification", "max_length": 64, "labels": ["negative", "positive"]}
    assert artifact.path == folder
    assert set(artifact.files) == {path.name for path in folder.iterdir()}
    assert not artifact.trust_remote_code


def test_an_onnx_model_is_one(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), folder / "model.onnx")
    assert load_folder(folder).format == "onnx"


def test_labels_in_the_order_of_the_outputs(folder: Path) -> None:
    edit(folder, id2label={str(i): f"n{i}" for i in reversed(range(11))})
    assert load_folder(folder).task["labels"] == [f"n{i}" for i in range(11)]
    edit(folder, id2label=None, max_position_embeddings=512)
    assert load_folder(folder).task["labels"] == ["LABEL_0", "LABEL_1"]
    assert load_folder(folder).task["max_length"] == 128


def test_a_link_to_the_folder_is_followed_but_none_in_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert load_folder(tmp_path / "link").path == folder
    (folder / "extra").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="symbolic link: extra"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, SourceError, "code of the model's own"),
        ({"architectures": ["BertForPreTraining"]}, StoreError, "architecture BertForPreTraining can't be told"),
        ({"architectures": None}, StoreError, "without `architectures`"),
        ({"architectures": 5}, StoreError, "without `architectures`"),
        ({"id2label": {"a": "b"}}, StoreError, "makes no sense"),
        ({"id2label": 3}, StoreError, "makes no sense"),
    ],
)
def test_what_can_not_be_served_is_refused(
    folder: Path, changes: dict[str, Any], error: type[OptimizeError], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(error, match=message):
        load_folder(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="only pickled weights"):
        load_folder(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no folder"):
        load_folder(tmp_path / "nothing")
