"""Wheels: built here, and found by pip in a folder (`PIP_NO_INDEX`, `PIP_FIND_LINKS`)."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optimize.errors import SourceError
from optimize.source import wheel as wheels
from optimize.source.wheel import Wheel

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Make the wheel `pico-files==1.0` with these members and put it where pip looks; returns its path."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path / "cache"))

    def make(
        members: Mapping[str | zipfile.ZipInfo, bytes],
        record: Mapping[str, bytes] | None = None,
        name: str = "pico_files",
    ) -> Path:
        info = f"{name}-1.0.dist-info"
        content: dict[str | zipfile.ZipInfo, bytes] = {
            **members,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        lines = []
        for member, data in content.items():
            file = member if isinstance(member, str) else member.filename
            digest = hashlib.sha256((record or {}).get(file, data)).digest()
            lines.append(f"{file},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},{len(data)}\n")
        path = index / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in content.items():
                archive.writestr(member, data)
            archive.writestr(f"{info}/RECORD", "".join([*lines, f"{info}/RECORD,,\n"]))
        return path

    return make


MEMBERS = {
    "pico_files/__init__.py": b"raise RuntimeError('code of the wheel ran')",
    "pico_files/model/config.json": b"{}",
    "pico_files/model/sub/a.txt": b"a",
    "pico_files/rows.csv": b"text,label\nfine,1\n",
}
SOURCE = "wheel://Pico_Files==1.0/pico_files/model"


def taken(source: str, folder: Path, patterns: tuple[str, ...] = ("*",)) -> dict[str, bytes]:
    folder.mkdir()
    Wheel.parse(source).copy(patterns, folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_takes_a_folder_and_a_file_out_of_a_wheel(build: Build, tmp_path: Path) -> None:
    path = build(MEMBERS)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert taken(SOURCE, tmp_path / "a") == {"config.json": b"{}", "sub/a.txt": b"a"}
    assert taken(f"{SOURCE}/#sha256={digest.upper()}", tmp_path / "b", ("*.json",)) == {"config.json": b"{}"}
    assert taken("wheel://pico.files==1.0/pico_files/rows.csv", tmp_path / "c") == {
        "rows.csv": MEMBERS["pico_files/rows.csv"]
    }
    assert Wheel.parse(SOURCE).identity == {
        "kind": "wheel",
        "name": "pico-files",
        "version": "1.0",
        "path": "pico_files/model",
    }


def test_pip_is_asked_once(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(MEMBERS)
    taken(SOURCE, tmp_path / "a")
    monkeypatch.setattr(wheels, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert taken(SOURCE, tmp_path / "b")["config.json"] == b"{}"


@pytest.mark.parametrize(
    "source",
    [
        "wheel://--index-url==1.0/x",
        "wheel://-r==1/x",
        "wheel://name/x",
        "wheel://name>=1.0/x",
        "wheel://name==1.*/x",
        "wheel://name==/x",
        "wheel://name==1.0",
        "wheel://name==1.0/",
        "wheel://name==1.0/../x",
        "wheel://name==1.0/a/../../x",
        "wheel://name==1.0//etc/passwd",
        "wheel://name==1.0/a\\b",
        "wheel://name==1.0/C:/x",
        "wheel://name==1.0/x#sha256=abc",
        "wheel://name==1.0/x#md5=d41d8cd98f00b204e9800998ecf8427e",
        "wheel://name @ file:///tmp/x.whl==1/x",
        "wheel://name==1.0 --pre/x",
        "wheel://name==1.0\n/x",
        f"wheel://{'n' * 200}==1.0/x",
    ],
)
def test_what_is_no_wheel_source_is_refused(source: str) -> None:
    with pytest.raises(SourceError, match="can't read the source"):
        Wheel.parse(source)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("../escaped", b"x"),
        ("pico_files/model/../../../escaped", b"x"),
        ("/tmp/escaped", b"x"),
        ("C:/escaped", b"x"),
        ("pico_files\\model\\escaped", b"x"),
        (link("pico_files/model/link"), b"/etc/passwd"),
    ],
)
def test_a_hostile_member_condemns_the_wheel(
    build: Build, tmp_path: Path, member: str | zipfile.ZipInfo, content: bytes
) -> None:
    build({**MEMBERS, member: content})
    for number, source in enumerate((SOURCE, "wheel://pico-files==1.0/pico_files/rows.csv")):
        with pytest.raises(SourceError, match=r"leads out of it|is a link"):
            taken(source, tmp_path / f"out{number}")
        assert list((tmp_path / f"out{number}").iterdir()) == []
    assert not list(tmp_path.rglob("escaped"))


def test_nothing_that_lies_where_the_user_stands_runs(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(MEMBERS)
    cloned = tmp_path / "cloned"
    cloned.mkdir()
    (cloned / "pip.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(cloned)
    assert taken(SOURCE, tmp_path / "out")["config.json"] == b"{}"


def test_a_bomb_is_not_unpacked(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build({**MEMBERS, "pico_files/model/zeros": bytes(8 * 2**20)})
    with pytest.raises(SourceError, match=r"zeros in the wheel pico-files==1.0 unpacks to 8,388,608 bytes"):
        taken(SOURCE, tmp_path / "ratio")
    build(MEMBERS)
    monkeypatch.setattr(wheels, "MAX_BYTES", 2)
    with pytest.raises(SourceError, match="unpacks to"):
        taken(SOURCE, tmp_path / "sum")


def test_a_member_that_differs_from_the_record_is_refused(build: Build, tmp_path: Path) -> None:
    build(MEMBERS, record={"pico_files/model/config.json": b"something else"})
    with pytest.raises(SourceError, match="differs from the wheel's own RECORD"):
        taken(SOURCE, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_a_wheel_with_another_hash_is_refused_and_not_kept(build: Build, tmp_path: Path) -> None:
    found = hashlib.sha256(build(MEMBERS).read_bytes()).hexdigest()
    with pytest.raises(SourceError, match=f"has SHA-256 {found}, but the recipe pins {'0' * 64}"):
        taken(f"{SOURCE}#sha256={'0' * 64}", tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_damaged_cache_is_fetched_again(build: Build, tmp_path: Path) -> None:
    build(MEMBERS)
    cached = Wheel.parse(SOURCE).file
    whole = cached.read_bytes()
    for damaged in (whole[:-1] + b"?", whole[:100]):
        cached.write_bytes(damaged)
        assert Wheel.parse(SOURCE).file.read_bytes() == whole
    (cached.parent / "sha256").unlink()
    assert Wheel.parse(SOURCE).file.read_bytes() == whole


def test_pips_reason_and_what_to_try(build: Build) -> None:
    build(MEMBERS)
    with pytest.raises(SourceError, match=r"No matching distribution found for pico-files==2\.0") as caught:
        _ = Wheel.parse("wheel://pico-files==2.0/x").file
    assert "pip config list" in str(caught.value.hint)


def test_a_path_that_the_wheel_lacks(build: Build, tmp_path: Path) -> None:
    build(MEMBERS)
    with pytest.raises(SourceError, match="holds nothing at pico_files/modle") as caught:
        taken("wheel://pico-files==1.0/pico_files/modle", tmp_path / "out")
    assert "did you mean pico_files/model" in str(caught.value.hint)


def test_no_zip_at_all(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_: Wheel, folder: Path) -> None:
        (folder / "pico_files-1.0-py3-none-any.whl").write_bytes(b"<html>log in first</html>")

    monkeypatch.setattr(wheels, "_pip_download", download)
    build(MEMBERS)
    with pytest.raises(SourceError, match="is no wheel"):
        taken(SOURCE, tmp_path / "out")


FETCH = f"""
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from optimize.source import wheel
download = wheel._pip_download
def slowly(*arguments):
    download(*arguments)
    print("there", flush=True)
    time.sleep(60)
wheel._pip_download = slowly
wheel.Wheel.parse("{SOURCE}").file
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_fetch_starts_again(build: Build, tmp_path: Path, how: signal.Signals) -> None:
    build(MEMBERS)
    command = [sys.executable, "-c", FETCH]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(how)
    kept = [path for path in (tmp_path / "cache/wheels").iterdir() if path.suffix != ".lock"]
    assert [path.name for path in kept] == (["pico-files-1.0.part"] if how is signal.SIGKILL else [])
    started = time.monotonic()
    assert taken(SOURCE, tmp_path / "out")["config.json"] == b"{}"
    assert time.monotonic() - started < 30
    assert not (tmp_path / "cache/wheels/pico-files-1.0.part").exists()


def test_two_at_once_download_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build(MEMBERS)
    calls = []
    download = wheels._pip_download

    def counted(wheel: Wheel, folder: Path) -> None:
        calls.append(wheel)
        download(wheel, folder)

    monkeypatch.setattr(wheels, "_pip_download", counted)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: Wheel.parse(SOURCE).file, range(4)))
    assert len(set(files)) == 1
    assert len(calls) == 1
