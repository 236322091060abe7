"""The hub, played by a server on loopback that knows the few routes that `huggingface_hub` and `datasets` use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34


class StandIn(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    """`models/org/name` -> file -> content."""
    requests: ClassVar[list[str]] = []
    spoil: ClassVar[set[str]] = set()
    """Files that are delivered with a flipped byte."""
    stalled: ClassVar[threading.Event | None] = None
    """Set when half of the weights were delivered; then no more comes."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
        return {"type": "file", "path": name, "size": len(content), "oid": oid} | (large if is_large(name) else {})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[3:4] == ["gated"]:
            return self.reply(403, X_Error_Code="GatedRepo")
        if parts[0] == "api" and len(parts) >= 4:
            repo, rest = "/".join(parts[1:4]), parts[4:]
            files = self.files.get(repo)
            if files is None:
                return self.reply(404, X_Error_Code="RepoNotFound")
            if rest[:1] in (["revision"], ["tree"]) and rest[1] not in ("main", COMMIT):
                return self.reply(404, X_Error_Code="RevisionNotFound")
            if rest[:1] == ["tree"]:
                return self.reply_json([self.entry(name, content) for name, content in files.items()])
            if rest[:1] == ["paths-info"]:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
                return self.reply_json([self.entry(name, files[name]) for name in asked if name in files])
            siblings = [{"rfilename": name} for name in files]
            return self.reply_json({"id": repo.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        kind, parts = (parts[0], parts[1:]) if parts[0] == "datasets" else ("models", parts)
        files = self.files.get(f"{kind}/{'/'.join(parts[:2])}", {})
        name = "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content, entry = files[name], self.entry(name, files[name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{etag}"', "X_Linked_ETag": f'"{etag}"'}
        if name in self.spoil:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers |= {"X_Linked_Size": str(len(content)), "Accept_Ranges": "bytes"}
        if self.command == "GET" and is_large(name) and self.stalled:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.stalled.set()
            return time.sleep(5)
        if start := int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0]):
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[start:], **headers)
        return self.reply(200, content, **headers)

    do_HEAD = do_POST = do_GET


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet"))


@pytest.fixture
def hub(tmp_path: Path, pico_model: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that takes the stand-in for the hub."""
    StandIn.files = {
        "models/org/pico": {path.name: path.read_bytes() for path in pico_model.iterdir()}
        | {"pytorch_model.bin": b"never fetched", "onnx/model.onnx": b"never fetched"},
        "models/org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"never fetched"},
        "models/org/coded": {"config.json": b'{"auto_map": {"AutoModel": "code.Model"}}', "model.safetensors": b"x"},
        "datasets/org/rows": {
            "train.csv": "".join(["text,label\n", *(f"train {i},{i % 2}\n" for i in range(40))]).encode(),
            "test.csv": "".join(["text,label\n", *(f"test {i},{i % 2}\n" for i in range(10))]).encode(),
        },
    }
    StandIn.requests = []
    StandIn.spoil = set()
    StandIn.stalled = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    yield environment
    server.shutdown()
    server.server_close()


MODEL = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from optimize.errors import SourceError
from optimize.source import resolve_model
source, revision, folder = sys.argv[1:]
try:
    block = SimpleNamespace(
        source=source, task="text-classification", module=None, revision=revision or None, trust_remote_code=False
    )
    model = resolve_model(block, Path())
    identity = model.identity
    if folder:
        Path(folder).mkdir()
        model.copy_to(Path(folder))
    print(json.dumps(identity))
except SourceError as error:
    print(json.dumps({"error": str(error)}))
"""


def take(environment: dict[str, str], source: str, folder: Path | str = "", revision: str = "") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MODEL, source, revision, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_model_is_named_by_its_commit_and_only_what_is_needed_is_fetched(
    hub: dict[str, str], tmp_path: Path, pico_model: Path
) -> None:
    identity = take(hub, "org/pico", tmp_path / "model")
    assert identity == {"kind": "hub", "type": "model", "repo": "org/pico", "commit": COMMIT}
    got = {path.name: path for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(got) <= {p.name for p in pico_model.iterdir()}
    assert all(path.read_bytes() == (pico_model / name).read_bytes() for name, path in got.items())
    assert not any(path.is_symlink() for path in got.values())
    assert not any(".bin" in request or "onnx" in request for request in StandIn.requests)
    assert len(StandIn.requests) < 40


def test_offline_the_cache_answers(hub: dict[str, str], tmp_path: Path) -> None:
    assert "can't be reached" in take({**hub, "HF_HUB_OFFLINE": "1"}, "org/pico")["error"]
    assert take(hub, "org/pico", tmp_path / "first")["commit"] == COMMIT
    asked = len(StandIn.requests)
    assert take({**hub, "HF_HUB_OFFLINE": "1"}, "org/pico", tmp_path / "second")["commit"] == COMMIT
    assert (tmp_path / "second" / "model.safetensors").is_file()
    assert len(StandIn.requests) == asked


def test_a_whole_commit_needs_no_network_to_be_named(hub: dict[str, str]) -> None:
    assert take(hub, "org/pico", revision=COMMIT)["commit"] == COMMIT
    assert StandIn.requests == []


def test_a_damaged_blob_in_the_cache_is_fetched_again(hub: dict[str, str], tmp_path: Path, pico_model: Path) -> None:
    take(hub, "org/pico", tmp_path / "first")
    blob = next((tmp_path / "hf").rglob("snapshots/*/model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert "commit" in take(hub, "org/pico", tmp_path / "second")
    assert (tmp_path / "second/model.safetensors").read_bytes() == (pico_model / "model.safetensors").read_bytes()


def test_a_killed_download_is_finished_by_the_next(hub: dict[str, str], tmp_path: Path, pico_model: Path) -> None:
    StandIn.stalled = threading.Event()
    with subprocess.Popen([sys.executable, "-c", MODEL, "org/pico", "", str(tmp_path / "killed")], env=hub) as process:
        assert StandIn.stalled.wait(60)
        process.kill()
    StandIn.stalled = None
    assert "commit" in take(hub, "org/pico", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (pico_model / "model.safetensors").read_bytes()


def test_what_differs_from_its_hash_is_refused(hub: dict[str, str], tmp_path: Path) -> None:
    StandIn.spoil = {"model.safetensors"}
    assert "differs from what the hub says" in take(hub, "org/pico", tmp_path / "model")["error"]


@pytest.mark.parametrize(
    ("source", "revision", "told"),
    [
        ("org/nothing", "", "the hub has no model org/nothing"),
        ("org/gated", "", "is gated"),
        ("org/pico", "v9", "no revision 'v9'"),
        ("org/pickled", "", "has no model.safetensors"),
        ("org/coded", "", "trust_remote_code"),
    ],
)
def test_errors_say_what_and_what_to_try(
    hub: dict[str, str], tmp_path: Path, source: str, revision: str, told: str
) -> None:
    error = take(hub, source, tmp_path / "model", revision)["error"]
    assert told in error
    assert "try: " in error
    assert not any(".bin" in request for request in StandIn.requests)


ROWS = """
import json, os, sys
from pathlib import Path
from optimize import tasks
from optimize.data import prepare
from optimize.errors import SourceError
from optimize.work import Work
task = tasks.get("text-classification")
try:
    data = prepare(task.Data.model_validate(json.loads(sys.argv[1])), task, Work(sys.argv[2]), Path())
    texts = {split: data.rows(split)["text"].to_pylist() for split in data.num_rows}
    print(json.dumps({"texts": texts, "datasets": "datasets" in sys.modules}))
except SourceError as error:
    print(json.dumps({"error": str(error)}))
# Now and then a thread of what `datasets` read with is alive when Python ends, which then aborts (arrow issue 45214).
sys.stdout.flush()
os._exit(0)
"""


def prepare(environment: dict[str, str], work: Path, **config: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", ROWS, json.dumps(config), str(work)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_data_set_gives_its_own_splits_and_shares_of_train(hub: dict[str, str], tmp_path: Path) -> None:
    splits = {"train": 0.8, "validation": 0.2, "evaluation": "test"}
    texts = prepare(hub, tmp_path, source="org/rows", splits=splits)["texts"]
    assert {split: len(rows) for split, rows in texts.items()} == {"train": 32, "validation": 8, "evaluation": 10}
    assert all(text.startswith("test") for text in texts["evaluation"])
    assert all(text.startswith("train") for text in texts["train"] + texts["validation"])
    StandIn.requests.clear()
    again = prepare(hub, tmp_path, source="org/rows", splits=splits)
    assert again == {"texts": texts, "datasets": False}
    assert StandIn.requests == ["GET /api/datasets/org/rows/revision/main"]


def test_a_split_that_the_data_set_lacks(hub: dict[str, str], tmp_path: Path) -> None:
    error = prepare(hub, tmp_path, source="org/rows", splits={"train": "train", "evaluation": "dev"})["error"]
    assert "no split 'dev'" in error
    assert "train, test" in error
