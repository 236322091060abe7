"""What TensorBoard reads of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from written_runs import document, run_id, write

from optimize.track import tensorboard
from optimize.track.content import Content
from optimize.track.tensorboard import Config
from optimize.work import Work

pytest.importorskip("tensorboard")


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_what_its_files_hold(work: Work) -> None:
    folder = write(work.runs, document(1, accuracy=0.75, p50_ms=4.0))
    logs = folder / "logs" / "teacher"
    logs.mkdir(parents=True)
    (logs / "training.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n', encoding="utf-8")
    for _ in range(2):  # once more replaces what is there
        where = tensorboard.send(Content.of(folder), Config(), work.root)
    assert Path(where) == work.root / "tensorboard" / "pico" / run_id(1)
    found = events(Path(where))
    assert [(one.step, one.value) for one in found.Scalars("int8/accuracy")] == [(0, 0.75)]
    assert found.Scalars("int8/accuracy.high")[0].value == pytest.approx(0.76)
    assert found.Scalars("int8/latency.batch_size_8.sequence_length_128.threads_1.over_teacher.speedup")[0].value == 2.5
    assert [(one.step, one.value) for one in found.Scalars("teacher/training.loss")] == [(10, 0.5), (20, 0.25)]
    assert found.Scalars("int8/accuracy")[0].wall_time == 1793491260
    text = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert text["verdict/text_summary"] == "pass"
    assert text["gates.0/text_summary"] == "pass: int8: accuracy fell by little: met"


def test_the_page_hparams(work: Work) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    folder = write(work.runs, document(2))
    where = tensorboard.send(Content.of(folder), Config(folder="boards"), work.root)
    assert Path(where) == work.root / "boards" / "pico" / run_id(2), "from the recipe's folder"
    content = events(Path(where)).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["stages.int8.mode"].string_value == "dynamic"
    experiment = events(Path(where)).summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = [one.name.tag for one in plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos]
    assert "int8/accuracy" in metrics
    assert "int8/size" in metrics
