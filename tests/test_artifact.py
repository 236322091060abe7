"""What an artifact is made of, and what is refused."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.artifact import Artifact, canonical_json
from optimize.errors import StoreError

TASK = {"name": "text-classification", "max_length": 8, "labels": ["a", "b"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "deep" / "er").mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"graph")
    (path / "deep" / "er" / "weights.bin").write_bytes(b"\0" * 1000)
    return path


def describe(path: Path) -> Artifact:
    return Artifact.from_directory(path, format="onnx", task=TASK)


def test_describes_files_and_nothing_of_where_or_when(folder: Path, tmp_path: Path) -> None:
    artifact = describe(folder)
    assert list(artifact.files) == ["deep/er/weights.bin", "model.onnx"]
    assert artifact.files["model.onnx"]["size"] == 5
    assert artifact.size_bytes == 1005
    elsewhere = tmp_path / "elsewhere"
    artifact.export_to(elsewhere)
    os.utime(elsewhere / "model.onnx", (0, 0))
    assert describe(elsewhere).digest == artifact.digest
    assert str(tmp_path) not in canonical_json(artifact.manifest).decode()


def test_digest_changes_with_bytes_format_task_and_details(folder: Path) -> None:
    artifact = describe(folder)
    others = [replace(artifact, format="openvino"), replace(artifact, task={}), replace(artifact, details={"a": 1})]
    (folder / "model.onnx").write_bytes(b"grapH")
    others.append(describe(folder))
    assert len({artifact.digest, *(other.digest for other in others)}) == 5


def test_manifest_round_trip(folder: Path) -> None:
    artifact = describe(folder)
    assert Artifact.from_manifest(folder, artifact.manifest) == artifact


def test_empty_folder_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(StoreError, match="no files"):
        describe(tmp_path / "empty")


def test_links_and_special_files_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    extra = folder / "deep" / "extra"

    extra.symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link: deep/extra"):
        describe(folder)
    extra.unlink()
    extra.symlink_to(folder / "model.onnx")  # inside, but still no plain file
    with pytest.raises(StoreError, match="symbolic link: deep/extra"):
        describe(folder)
    extra.unlink()
    extra.hardlink_to(outside)
    with pytest.raises(StoreError, match="hard link to a file outside: deep/extra"):
        describe(folder)
    extra.unlink()
    extra.hardlink_to(folder / "model.onnx")  # both names are inside: it can't be changed from elsewhere
    assert describe(folder).files["deep/extra"]["size"] == 5
    extra.unlink()
    os.mkfifo(extra)
    with pytest.raises(StoreError, match="neither a file nor a folder: deep/extra"):
        describe(folder)
    extra.unlink()
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="symbolic link: linked"):
        describe(folder)
    (tmp_path / "whole").symlink_to(folder)
    with pytest.raises(StoreError, match="not a folder"):
        describe(tmp_path / "whole")


def test_socket_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the address must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(StoreError, match="neither a file nor a folder: s"):
            describe(folder)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "\x1b[31m", b"\xff".decode(errors="surrogateescape")])
def test_names_that_are_not_plain_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(StoreError, match="not a plain name") as caught:
        describe(folder)
    assert str(caught.value).isascii()


@given(
    name=st.text(min_size=1, max_size=20) | st.sampled_from(["..", "../x", "/etc/passwd", "a/../../x", "a//b", "C:/x"])
)
@settings(max_examples=200, deadline=None)
def test_a_manifest_can_only_name_files_below_its_folder(name: str) -> None:
    manifest = {
        "schema": 1,
        "format": "onnx",
        "task": {},
        "files": {name: {"size": 1, "sha256": "0" * 64}},
        "details": {},
        "trust_remote_code": False,
    }
    root = Path("/nowhere/root")
    try:
        artifact = Artifact.from_manifest(root, manifest)
    except StoreError:
        return
    (kept,) = artifact.files
    assert Path(os.path.normpath(root / kept)).is_relative_to(root)
    assert ".." not in kept.split("/")
    assert kept.isprintable() or not any(ord(character) < 32 for character in kept)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    )
)
@settings(max_examples=100, deadline=None)
def test_a_manifest_of_any_shape_is_read_or_refused(manifest: object) -> None:
    with pytest.raises(StoreError):
        Artifact.from_manifest(Path("/nowhere"), manifest)


def test_newer_manifest_is_refused_with_advice(folder: Path) -> None:
    with pytest.raises(StoreError, match="newer"):
        Artifact.from_manifest(folder, describe(folder).manifest | {"schema": 2})


def test_verify_names_every_damaged_file(folder: Path) -> None:
    artifact = describe(folder)
    artifact.verify()
    (folder / "model.onnx").write_bytes(b"grapH")
    (folder / "deep" / "er" / "weights.bin").write_bytes(b"short")
    (folder / "new").write_bytes(b"")
    (folder / "link").symlink_to("/etc/passwd")
    assert artifact.problems() == [
        "symbolic link: link",
        "extra file: new",
        "5 bytes, not 1000: deep/er/weights.bin",
        "bytes have changed: model.onnx",
    ]
    (folder / "model.onnx").unlink()
    with pytest.raises(StoreError, match=r"missing file: model\.onnx"):
        artifact.verify()


def test_export_gives_plain_writable_files(folder: Path, tmp_path: Path) -> None:
    artifact = describe(folder)
    (folder / "model.onnx").chmod(0o444)
    target = tmp_path / "out" / "model"
    assert artifact.export_to(target) == target
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == set(artifact.files)
    assert (target / "model.onnx").stat().st_mode & 0o200
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_export_into_an_empty_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    describe(folder).export_to(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"graph"


def test_export_refuses_what_holds_anything(folder: Path, tmp_path: Path) -> None:
    artifact = describe(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(StoreError, match="not an empty folder"):
            artifact.export_to(tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "keep"


def test_export_of_damaged_bytes_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    artifact = describe(folder)
    (folder / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(StoreError, match=r"bytes have changed: model\.onnx"):
        artifact.export_to(tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
