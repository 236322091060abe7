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
        self._held: dict[str, NDArray[Any]] = {}

    def key(self, artifact: Artifact) -> dict[str, Any]:
        """What the outputs, and all that is computed from them, depend on."""
        machine = host.fingerprint()
        return {
            "artifact": artifact.digest,
            "rows": self.data.digests[SPLIT],
            "task": [self.task.name, self.task.VERSION, self._spec(artifact)],
            "batch_size": self.batch_size,
            "threads": self.threads,
            "cpu": machine["cpu"],
            "libraries": {name: value for name, value in machine["libraries"].items() if name != host.OURSELVES},
        }

    def of(self, name: str, artifact: Artifact) -> NDArray[Any]:
        """One output an input [n, ...]: numbers, or records. Raises `EvaluationError` where they can't be had or are
        not finite.
        """
        if artifact.digest not in self._held:
            self._held[artifact.digest] = self.scores.array(
                "outputs", self.key(artifact), lambda: self._answer(name, artifact)
            )
        return self._held[artifact.digest]

    def pair(self, name: str, artifact: Artifact, other: str, reference: Artifact) -> tuple[NDArray[Any], NDArray[Any]]:
        """Both one's outputs. Raises `EvaluationError` where they do not answer the same."""
        ours, theirs = self.of(name, artifact), self.of(other, reference)
        if fault := self.task.incomparable(ours, theirs):
            raise EvaluationError(f"it can't be held against {other}: {fault}", stage=name)
        return ours, theirs

    @cached_property
    def rows(self) -> pa.Table:
        return self.data.rows(SPLIT)

    @cached_property
    def targets(self) -> NDArray[Any]:
        return self.task.targets(self.rows)

    def inputs(self, name: str, artifact: Artifact, *, batch_size: int, sequence_length: int) -> Mapping[str, Any]:
        """One batch of evaluation rows to measure the speed of a call with."""
        # A running text needs as many rows as it takes.
        rows = self.rows if self.task.generates else self.rows.slice(0, batch_size)
        with _said_of(name):
            return self.task.latency_inputs(
                self.preprocessor(artifact),
                rows,
                artifact.task,
                batch_size=batch_size,
                sequence_length=sequence_length,
            )

    def preprocessor(self, artifact: Artifact) -> Any:
        return self.task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)

    def _spec(self, artifact: Artifact) -> dict[str, Any]:
        return dict(self.task.evaluation_spec(artifact.task, self.data.info))

    def _answer(self, name: str, artifact: Artifact) -> NDArray[Any]:
        with _said_of(name):
            outputs = self.task.respond(
                runtimes.open_artifact(artifact, self.threads),
                self.preprocessor(artifact),
                self.rows,
                self._spec(artifact),
                batch_size=self.batch_size,
                on_batch=lambda done, total: self.on_batch(name, done, total),
            )
        if bad := int(len(outputs) - _finite(outputs).sum()):
            raise EvaluationError(
                f"{bad} of {len(outputs)} {self.task.unit} get an output that is not a finite number",
                stage=name,
                hint="keep the layers that overflow in floating point (`ignore`), or use another mode",
            )
        return outputs


def _finite(outputs: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether all numbers of an output, in every field of a record, are finite [n]."""
    import numpy as np

    if outputs.dtype.names is not None:
        return np.logical_and.reduce([_finite(outputs[name]) for name in outputs.dtype.names])  # type: ignore[no-any-return]
    if outputs.dtype.kind == "S":  # text
        return np.ones(len(outputs), dtype=bool)
    return np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1)  # type: ignore[no-any-return]


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
