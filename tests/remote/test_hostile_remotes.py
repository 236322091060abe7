"""What lies on a remote may be anybody's: nothing of it leads out of the store, and nothing false gets in."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from promoting import NAME, SECRET, SHARED, promote

from optimize import atomic
from optimize.artifact import digest_of
from optimize.errors import OptimizeError, RecipeError, RegistryError, RemoteError, SourceError
from optimize.remote import layout, pull, push
from optimize.remote.places import open_place, shown
from optimize.remote.settings import find_remote, need_remote
from optimize.work import Work

NewWork = Callable[[str], Work]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
def digest(folder: Path, new_work: NewWork) -> str:
    """Of what is promoted on the remote."""
    work = new_work("theirs")
    digest = promote(work, 1)
    push(remote=str(folder), work=work)
    return digest


def contents(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.is_file()}


def manifest(**changes: Any) -> dict[str, Any]:
    whole = {
        "schema": 1,
        "format": "onnx",
        "task": {"name": "text-classification"},
        "files": {"config.json": {"size": 2, "sha256": "a" * 64}},
        "details": {},
        "trust_remote_code": False,
    }
    return {**whole, **changes}


def plant(folder: Path, content: Any) -> str:
    """A manifest under its true digest."""
    digest = digest_of(content)
    atomic.write_bytes(folder / layout.manifest_name(digest), json.dumps(content).encode())
    return digest


FILE = {"size": 2, "sha256": "a" * 64}


@pytest.mark.parametrize(
    "files",
    [
        {"../../outside.txt": FILE},
        {"/tmp/outside.txt": FILE},
        {"deep/../../outside.txt": FILE},
        {"a\\..\\b": FILE},
        {"C:/outside.txt": FILE},
        {"": FILE},
        {"a\nb": FILE},
        {"a": FILE, "a/b": FILE},
        {"a": {"size": -1, "sha256": "a" * 64}},
        {"a": {"size": 2, "sha256": "../../../etc/passwd"}},
        {"a": {"size": 2, "sha256": "A" * 64}},
        {"a": {"size": "many", "sha256": "a" * 64}},
        {"a": []},
        {},
        [],
    ],
)
def test_manifests_that_lead_elsewhere(files: Any, folder: Path, tmp_path: Path, new_work: NewWork) -> None:
    digest = plant(folder, manifest(files=files))
    before = contents(tmp_path)
    work = new_work("here")
    with pytest.raises(RemoteError, match="is false") as caught:
        pull(digest, remote=str(folder), work=work)
    assert caught.value.exit_code == 4
    new = {path for path in contents(tmp_path) - before if "in-use" not in path}
    assert not new


@pytest.mark.parametrize(
    "data", [b"", b"[" * 100_000, b"null", b'{"schema": 1}', b"\xff", b'{"files": {"a": {"size": 1e999}}}']
)
def test_manifests_that_are_none(data: bytes, folder: Path, digest: str, new_work: NewWork) -> None:
    atomic.write_bytes(folder / layout.manifest_name(digest), data)
    with pytest.raises(RemoteError, match="is false"):
        pull(remote=str(folder), work=new_work("here"))


def test_a_manifest_of_something_else(folder: Path, digest: str, new_work: NewWork) -> None:
    other = plant(folder, manifest())
    path = folder / layout.manifest_name(digest)
    path.write_bytes((folder / layout.manifest_name(other)).read_bytes())
    with pytest.raises(RemoteError, match="describes something else"):
        pull(remote=str(folder), work=new_work("here"))


def test_a_giant_is_not_fetched(folder: Path, new_work: NewWork) -> None:
    folder.mkdir()
    digest = plant(folder, manifest(files={"config.json": {"size": 1 << 60, "sha256": "a" * 64}}))
    with pytest.raises(RemoteError, match="are free"):
        pull(digest, remote=str(folder), work=new_work("here"))


@pytest.mark.parametrize("bytes_there", [SHARED[:-1] + b"\x02", SHARED[:-1], SHARED + b"more", b""])
def test_bytes_of_another_digest(bytes_there: bytes, folder: Path, digest: str, new_work: NewWork) -> None:
    (target,) = [path for path in (folder / "objects").rglob("*") if path.is_file() and path.read_bytes() == SHARED]
    target.chmod(0o644)
    target.write_bytes(bytes_there)
    work = new_work("here")
    with pytest.raises(RemoteError, match=r"weights\.bin") as caught:
        pull(remote=str(folder), work=work)
    assert "push it again" in str(caught.value.hint)
    assert not work.store.has(digest)
    assert not work.registry.list()


def test_links_are_not_followed(folder: Path, digest: str, tmp_path: Path, new_work: NewWork) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(SHARED)
    (target,) = [path for path in (folder / "objects").rglob("*") if path.is_file() and path.read_bytes() == SHARED]
    target.unlink()
    target.symlink_to(outside)
    with pytest.raises(RemoteError, match="a link leads out"):
        pull(remote=str(folder), work=new_work("here"))
    (folder / "registry").rename(tmp_path / "elsewhere")
    (folder / "registry").symlink_to(tmp_path / "elsewhere")
    writer = new_work("theirs")
    promote(writer, 2)
    with pytest.raises(RemoteError, match="a link leads out"):
        push(remote=str(folder), work=writer)


def test_code_needs_trust(folder: Path, new_work: NewWork) -> None:
    work = new_work("theirs")
    digest = promote(work, 1, trust_remote_code=True)
    push(remote=str(folder), work=work)
    with pytest.raises(SourceError, match="code of its own"):
        pull(remote=str(folder), work=new_work("here"))
    trusting = new_work("trusting")
    pull(remote=str(folder), work=trusting, trust_remote_code=True)
    assert trusting.store.holds(digest)


def sealed(**changes: Any) -> bytes:
    """A first entry that anybody could write."""
    entry = {
        "action": "promote",
        "name": NAME,
        "alias": "production",
        "version": 1,
        "digest": digest_of(1),
        "verdict": "pass",
        "waiver": None,
        "run": "run-1",
        "recipe_digest": digest_of("r"),
        "gates": [],
        "number": 1,
        "previous": None,
        "who": "me",
        "host": "here",
        "when": "2026-01-01T00:00:00+00:00",
        **changes,
    }
    return atomic.json_bytes({**entry, "seal": digest_of(entry)})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc"},
        {"alias": "a/b"},
        {"alias": "7"},
        {"digest": "sha256:../../x"},
        {"version": "1"},
        {"version": 0},
        {"run": None},
        {"who": ["x"]},
        {"action": "destroy"},
        {"waiver": {"surprise": 1}},
        {"previous": "sha256:" + "0" * 64},
        {"number": 2},
    ],
)
def test_entries_that_nobody_would_write(changes: dict[str, Any], folder: Path, new_work: NewWork) -> None:
    atomic.write_bytes(folder / "registry" / "00000001.json", sealed(**changes))
    work = new_work("here")
    with pytest.raises(RegistryError):
        pull(remote=str(folder), work=work)
    assert not work.registry.log.root.exists()


def test_a_run_that_is_a_path_is_not_looked_for(folder: Path, tmp_path: Path, new_work: NewWork) -> None:
    atomic.write_bytes(folder / "registry" / "00000001.json", sealed(run="../../../outside"))
    work = new_work("here")
    with pytest.raises(RemoteError, match="no artifact"):
        pull(remote=str(folder), work=work)
    assert not (tmp_path / "outside").exists()


def test_a_changed_entry_and_a_gap(folder: Path, digest: str, new_work: NewWork) -> None:
    entry = folder / "registry" / "00000001.json"
    whole = entry.read_bytes()
    entry.chmod(0o644)
    entry.write_bytes(whole.replace(b'"pass"', b'"fail"'))
    with pytest.raises(RegistryError, match="changed or cut short"):
        pull(remote=str(folder), work=new_work("here"))
    entry.rename(folder / "registry" / "00000003.json")
    with pytest.raises(RegistryError, match="entry 1 of the remote's log is missing"):
        pull(remote=str(folder), work=new_work("here"))


def test_no_error_shows_a_credential(bucket: str, monkeypatch: pytest.MonkeyPatch, new_work: NewWork) -> None:
    work = new_work("here")
    promote(work, 1)
    with pytest.raises(RemoteError, match="no place in the URL") as refused:
        push(remote="s3://user:hunter2@bucket/x", work=work)
    with pytest.raises(RemoteError, match="does the bucket exist") as absent:
        push(remote="s3://no-such-bucket-here/x", work=work)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(RemoteError, match="server reachable") as unreachable:
            push(remote=bucket, work=work)
    for caught, url in ((refused, "s3://bucket/x"), (absent, "s3://"), (unreachable, bucket)):
        told = str(caught.value)
        assert caught.value.exit_code == 4
        assert url in told
        assert not any(secret in told for secret in ("hunter2", SECRET, "testing"))
    assert shown("https://user:pass@host/path?token=abc") == "https://host/path"


def test_what_is_missing_is_named() -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(RemoteError) as caught:
            open_place("gs://bucket/path")
        assert 'pip install "optimize-workbench[gcs]"' in str(caught.value.hint)
    with pytest.raises(OptimizeError, match="not a remote"):
        open_place("nonsense://bucket")


def test_where_a_remote_is_named(tmp_path: Path, new_work: NewWork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTIMIZE_REMOTE", raising=False)
    work = new_work("here")
    assert find_remote(work) is None
    with pytest.raises(RecipeError, match="no remote is named"):
        need_remote(work)
    work.root.mkdir()
    settings = work.root / "settings.yaml"
    settings.write_text(f"remote: {tmp_path / 'a'}\n")
    assert need_remote(work).url == str(tmp_path / "a")
    monkeypatch.setenv("OPTIMIZE_REMOTE", str(tmp_path / "b"))
    assert need_remote(work).url == str(tmp_path / "b")
    assert need_remote(work, str(tmp_path / "c")).url == str(tmp_path / "c")
    monkeypatch.delenv("OPTIMIZE_REMOTE")
    settings.write_text("remotes: x\n")
    with pytest.raises(RecipeError, match="did you mean `remote`") as caught:
        need_remote(work)
    assert caught.value.exit_code == 2
