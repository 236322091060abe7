"""What Weights & Biases writes of a run where it is offline, read from its own file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from written_runs import document, run_id, write

from optimize.errors import TrackingError
from optimize.track import Target
from optimize.track.sending import send
from optimize.track.wandb import Config
from optimize.work import Work

pytest.importorskip("wandb")


def records(path: Path) -> list[Any]:
    """A `.wandb` file's records: LevelDB's log format (blocks of 32 kB; a record is one or several chunks)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def test_what_lies_offline(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = write(work.runs, document(1, accuracy=0.75))
    logs = folder / "logs" / "teacher"
    logs.mkdir(parents=True)
    (logs / "training.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n', encoding="utf-8")
    where = send(folder, Target("wandb", Config(project="films", mode="offline", timeout_seconds=280)))
    assert where.endswith(", for `wandb sync`")
    (path,) = Path(where.removesuffix(", for `wandb sync`")).glob("*.wandb")
    assert path.is_relative_to(work.root / "wandb")
    written = records(path)
    (run,) = [one.run for one in written if one.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.run_id, run.display_name) == ("films", run_id(1), run_id(1))
    config = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in run.config.update}
    assert config["stages.int8.mode"] == "dynamic"
    summary = {}
    for one in written:
        for update in one.summary.update:
            summary[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    assert (summary["int8/accuracy"], summary["int8/accuracy.low"]) == (0.75, 0.74)
    assert summary["verdict"] == "pass"
    logged = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
        for one in written
        if one.WhichOneof("record_type") == "history"
    ]
    assert [(one["teacher/training.loss"], one["teacher/training.loss.step"]) for one in logged] == [
        (0.5, 10),
        (0.25, 20),
    ]
    sent = [one.request.log_artifact.artifact for one in written if one.WhichOneof("record_type") == "request"]
    sent += [one.artifact for one in written if one.WhichOneof("record_type") == "artifact"]
    names = {entry.path for artifact in sent for entry in artifact.manifest.contents}
    assert {"run.json", "recipe.json"} <= names


def test_without_a_key_it_is_told(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(TrackingError, match="wandb did not take the run"):
        send(write(work.runs, document(2)), Target("wandb", Config(mode="online", base_url="http://127.0.0.1:9")))
