"""Runs in a real MLflow server on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from written_runs import document, failed, run_id, write

from optimize.errors import TrackingError
from optimize.track import TRACKERS, Target, mlflow, sending
from optimize.track.content import Content
from optimize.track.mlflow import Config
from optimize.work import Work

pytest.importorskip("mlflow")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. It is ended with all its workers."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    line += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, cwd=folder, env=quiet, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(2400):
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=10):
                        break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.1)
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)


@pytest.fixture
def client(server: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server)


def send(folder: Path, config: Config) -> str:
    """In this process, which has MLflow imported already."""
    return mlflow.send(Content.of(folder), config, folder)


def found(client: Any, experiment: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def test_a_run_arrives_whole(work: Work, server: str, client: Any, tmp_path: Path) -> None:
    folder = write(work.runs, document(1, accuracy=0.79, p50_ms=4.0))
    (folder / "report.html").write_text("<p>a report</p>", encoding="utf-8")
    logs = folder / "logs" / "teacher"
    logs.mkdir(parents=True)
    (logs / "training.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n', encoding="utf-8")
    where = send(folder, Config(uri=server, experiment="whole"))
    (run,) = found(client, "whole")
    assert where == f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert (run.info.run_name, run.info.status) == (run_id(1), "FINISHED")
    assert (run.info.start_time, run.info.end_time - run.info.start_time) == (1793491260000, 12500)
    metrics, parameters, tags = run.data.metrics, run.data.params, run.data.tags
    assert [metrics[f"int8/accuracy{end}"] for end in ("", ".low", ".high")] == pytest.approx([0.79, 0.78, 0.8])
    time_ = "int8/latency.batch_size_8.sequence_length_128.threads_1"
    assert (metrics[time_], metrics[f"{time_}.over_teacher.speedup"]) == (4.0, 2.5)
    assert metrics[f"{time_}.over_teacher.speedup.low"] == 1.9
    assert f"{time_}.over_teacher.speedup.high" not in metrics, "an end that nothing bounds"
    assert metrics["int8/accuracy.max_drop.margin"] == 0.0
    assert metrics["int8/size"] == 5e9
    assert (parameters["stages.int8.mode"], parameters["stages.teacher.epochs"]) == ("dynamic", "2.0")
    assert parameters["model.task"] == "text-classification"
    assert (tags["verdict"], tags["promoted"], tags["optimize.run"]) == ("pass", "production 2", run_id(1))
    assert tags["gates.0"] == "pass: int8: accuracy fell by little: met"
    assert "pass" in tags["mlflow.note.content"]
    curve = client.get_metric_history(run.info.run_id, "teacher/training.loss")
    assert [(point.step, point.value) for point in curve] == [(10, 0.5), (20, 0.25)]
    for name in ("run.json", "report.html", "recipe.json"):
        arrived = client.download_artifacts(run.info.run_id, name, str(tmp_path))
        assert Path(arrived).read_bytes() == (folder / name).read_bytes()


def test_sent_twice_is_one_run(work: Work, server: str, client: Any) -> None:
    folder = write(work.runs, document(2))
    config = Config(uri=server, experiment="twice", timeout_seconds=280)
    assert send(folder, config) == sending.send(folder, Target("mlflow", config)), "in a process of its own as here"
    (run,) = found(client, "twice")
    assert len(client.get_metric_history(run.info.run_id, "int8/accuracy")) == 1


def test_an_error_is_a_failed_run_and_the_recipe_names_the_experiment(
    work: Work, server: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    send(write(work.runs, failed(3)), Config())
    (run,) = found(client, "pico")
    assert (run.info.status, run.data.tags["verdict"]) == ("FAILED", "error")
    assert run.data.tags["summary"] == "ERROR in stage int8: no memory"


def test_more_than_a_request_takes(work: Work, server: str, client: Any) -> None:
    told = document(4)
    told["gates"] = [{**told["gates"][0], "reason": "x" * 9000}] * 130
    told["artifacts"] = [{**told["artifacts"][0], "name": f"a{number}"} for number in range(90)]
    stages = [{"quantize": "int8", "name": f"a{number}", "mode": "dynamic"} for number in range(90)]
    folder = write(work.runs, told, {"version": 1, "stages": stages, "data": {"columns": ["y" * 9000]}})
    send(folder, Config(uri=server, experiment="large"))
    (run,) = found(client, "large")
    assert len(run.data.metrics) > 1000
    assert len(run.data.params) == 272
    assert len([tag for tag in run.data.tags if tag.startswith("gates.")]) == 130


def test_a_server_that_is_down_is_given_up(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:s3cr3t@127.0.0.1:9")
    with pytest.raises(TrackingError, match="did not take the run: MlflowException") as caught:
        sending.send(write(work.runs, document(5)), Target("mlflow", Config(timeout_seconds=280)))
    assert "s3cr3t" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_a_server_that_never_answers_is_given_up(work: Work) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        config = Config(uri=f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_seconds=0.5)
        with pytest.raises(TrackingError, match=r"within 0.5 s, and was given up"):
            sending.send(write(work.runs, document(6)), Target("mlflow", config))


def test_it_is_registered() -> None:
    assert TRACKERS["mlflow"].load().Config is Config
