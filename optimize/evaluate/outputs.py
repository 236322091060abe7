"""What artifacts answer to the evaluation rows, through the runtime that would serve them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optimize import runtimes
from optimize.errors import EvaluationError, OptimizeError
from optimize.evaluate import host
from optimize.evaluate.scores import Scores

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.artifact import Artifact
    from optimize.data import Data
    from optimize.tasks import Task

SPLIT = "evaluation"


class Outputs:
    """Computed when first asked for, and kept: by artifact, rows, batch size, threads, processor and libraries."""

    def __init__(
        self,
        task: Task,
        data: Data,
        scores: Scores,
        *,
        batch_size: int,
        threads: int,
        on_batch: Callable[[str, int, int], None],
    ) -> None:
        self.task = task
        self.data = data
        self.scores = scores
        self.batch_size = batch_size
        self.threads = threads
        self.on_batch = on_batch
        """Told (name, rows done, rows in all)."""
        self._held: dict[str, NDArray[np.float32]] = {}

    def key(self, artifact: Artifact) -> dict[str, Any]:
        """What the outputs, and all that is computed from them, depend on."""
        machine = host.fingerprint()
        return {
            "artifact": artifact.digest,
            "rows": self.data.digests[SPLIT],
            "task": [self.task.name, self.task.VERSION],
            "batch_size": self.batch_size,
            "threads": self.threads,
            "cpu": machine["cpu"],
            "libraries": {name: value for name, value in machine["libraries"].items() if name != host.OURSELVES},
        }

    def of(self, name: str, artifact: Artifact) -> NDArray[np.float32]:
        """One output a row [n, ...]. Raises `EvaluationError` where they can't be had or are not finite."""
        if artifact.digest not in self._held:
            self._held[artifact.digest] = self.scores.array(
                "outputs", self.key(artifact), lambda: self._answer(name, artifact)
            )
        return self._held[artifact.digest]

    @cached_property
    def rows(self) -> pa.Table:
        return self.data.rows(SPLIT)

    @cached_property
    def targets(self) -> NDArray[Any]:
        return self.task.targets(self.rows)

    def inputs(self, name: str, artifact: Artifact, *, batch_size: int, sequence_length: int) -> Mapping[str, Any]:
        """One batch of evaluation rows to measure the speed of a call with."""
        with _said_of(name):
            return self.task.latency_inputs(
                self._preprocessor(artifact),
                self.rows.slice(0, batch_size),
                artifact.task,
                batch_size=batch_size,
                sequence_length=sequence_length,
            )

    def _preprocessor(self, artifact: Artifact) -> Any:
        return self.task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)

    def _answer(self, name: str, artifact: Artifact) -> NDArray[np.float32]:
        import numpy as np

        with _said_of(name):
            preprocessor = self._preprocessor(artifact)
            features = self.task.encode(preprocessor, self.rows, artifact.task)
            runner = runtimes.open_artifact(artifact, self.threads)
            outputs: NDArray[np.float32] | None = None
            done = 0
            for rows, inputs in self.task.batches(preprocessor, features, self.batch_size):
                batch = self.task.read_outputs(runner.run(inputs), inputs)
                if outputs is None:
                    outputs = np.empty((len(features), *batch.shape[1:]), dtype=np.float32)
                outputs[rows] = batch
                done += len(rows)
                self.on_batch(name, done, len(features))
        if outputs is None:
            raise EvaluationError("there are no evaluation rows", stage=name)
        if bad := int(len(outputs) - np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1).sum()):
            raise EvaluationError(
                f"{bad} of {len(outputs)} evaluation rows get an output that is not a finite number",
                stage=name,
                hint="keep the layers that overflow in floating point (`ignore`), or use another mode",
            )
        return outputs


@contextlib.contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is an error of that artifact."""
    try:
        yield
    except OptimizeError as error:
        error.stage = error.stage or name
        raise
    except Exception as error:
        raise EvaluationError(f"it can't answer: {type(error).__name__}: {error}", stage=name) from error
