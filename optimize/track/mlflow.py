"""Sends runs to MLflow, as one run of an experiment: parameters, metrics, tags and files.

    track:
      to: mlflow
      uri: http://127.0.0.1:5000     # by default MLFLOW_TRACKING_URI, or what MLflow itself takes
      experiment: sentiment          # by default the recipe's name

A password goes into `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, or a token into `MLFLOW_TRACKING_TOKEN`.

Source: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optimize.track.settings import Address, Settings

if TYPE_CHECKING:
    from optimize.track.content import Content

T = TypeVar("T")
RUN_TAG = "optimize.run"
MAX_KEY, MAX_PARAMETER, MAX_TAG = 250, 6000, 5000
"""Characters that every MLflow server takes."""
BATCH = 100
"""Parameters, metrics or tags a request: MLflow takes at most 100 of the first and the last."""
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""Its defaults try for minutes; what the environment says stays."""


class Config(Settings):
    """Where the run goes."""

    uri: Address | None = None
    """The tracking server or store; by default `MLFLOW_TRACKING_URI`, or what MLflow itself takes."""
    experiment: str | None = None
    """The experiment's name, made where there is none; by default the recipe's name."""


def send(content: Content, config: Config, base: Path) -> str:
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(tracking_uri=config.uri)
    experiment = _experiment(client, config.experiment or content.recipe_name)
    found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{content.run}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, content.began_ms, run_name=content.run)
    name = run.info.run_id
    parameters = [Param(key[:MAX_KEY], value[:MAX_PARAMETER]) for key, value in content.parameters.items()]
    tags = {RUN_TAG: content.run, "mlflow.note.content": content.note, **content.tags}
    metrics = [Metric(key[:MAX_KEY], value, content.began_ms, 0) for key, value in content.metrics.items()]
    metrics += [Metric(one.name[:MAX_KEY], one.value, content.began_ms, one.step) for one in content.curves]
    # The tag by which the run is found again goes first: what is cut short is gone on with, and not doubled.
    for some in _batches([RunTag(key[:MAX_KEY], value[:MAX_TAG]) for key, value in tags.items()]):
        client.log_batch(name, tags=some)
    for batch in _batches(parameters):
        client.log_batch(name, params=batch)
    for measured in _batches(metrics):
        client.log_batch(name, metrics=measured)
    for path in content.files:
        client.log_artifact(name, str(path))
    client.set_terminated(name, "FAILED" if content.failed else "FINISHED", content.ended_ms)
    root = client.tracking_uri if str(client.tracking_uri).startswith("http") else None
    return f"{root}/#/experiments/{experiment}/runs/{name}" if root else f"experiment {experiment}, run {name}"


def _experiment(client: Any, name: str) -> str:
    """Its id; made where there is none, also where another process makes it in the same moment."""
    from mlflow.exceptions import MlflowException

    if (known := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            if (known := client.get_experiment_by_name(name)) is None:
                raise
    return str(known.experiment_id)


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
