"""An artifact that answers: `optimize.load("minilm-sentiment@production").predict(["a fine film"])`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import runtimes, tasks

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.runtimes import Runner
    from optimize.work import Work


class Model:
    """An artifact to ask. Its files are opened at the first question, with `threads` threads (None: every core)."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        name: str = "",
        scores: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self.artifact = artifact
        self.name = name or artifact.digest[:19]
        self.scores = dict(scores or {})
        self.threads = threads
        self.task = tasks.get(artifact.task["name"])

    @cached_property
    def runner(self) -> Runner:
        from optimize.evaluate.host import cpu_count

        return runtimes.open_artifact(self.artifact, self.threads or cpu_count())

    @cached_property
    def preprocessor(self) -> Any:
        return self.task.preprocessor(self.artifact.path, trust_remote_code=self.artifact.trust_remote_code)

    def predict(self, inputs: Sequence[Any], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """One answer an input, in the order given, such as `{"label": "positive", "score": 0.98}`."""
        import numpy as np

        if isinstance(inputs, (str, bytes, Mapping)):
            raise TypeError("predict takes a list: predict([text])")
        if not inputs:
            return []
        features = self.task.encode(self.preprocessor, self.task.rows_of(inputs), self.artifact.task)
        outputs: list[Any] = [None] * len(features)
        for rows, batch in self.task.batches(self.preprocessor, features, batch_size):
            for row, output in zip(rows, self.task.read_outputs(self.runner.run(batch), batch), strict=True):
                outputs[row] = output
        return self.task.answers(np.stack(outputs), self.artifact.task)

    def __repr__(self) -> str:
        size = self.artifact.size_bytes / 1e6
        return f"<optimize.Model {self.name}: {self.artifact.format}, {size:.1f} MB, {self.artifact.digest[:19]}>"

    def _repr_html_(self) -> str:
        from html import escape

        rows = {
            "name": self.name,
            "task": self.artifact.task["name"],
            "format": self.artifact.format,
            "size": f"{self.artifact.size_bytes / 1e6:.1f} MB",
            "digest": self.artifact.digest[:19],
            **{
                metric: f"{score['value']:.4f}"
                for metric, score in self.scores.items()
                if isinstance(score, Mapping) and "value" in score
            },
        }
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{cells}</table>"


def load(reference: str | Path, *, work: Work | str | Path | None = None, threads: int | None = None) -> Model:
    """A model by `name@alias`, `name@version`, digest, or the path of a folder of plain files.

    Raises `StoreError` or `RegistryError` where the reference names nothing or the bytes are damaged.
    """
    return Model(find_artifact(reference, work), name=str(reference), threads=threads)


def find_artifact(reference: str | Path, work: Work | str | Path | None = None) -> Artifact:
    """The artifact that a person means, with its bytes checked. A folder wins over a name that looks the same."""
    from optimize.planning import as_work

    if isinstance(reference, Path) or Path(reference).is_dir() or reference.startswith((".", "/", "~")):
        from optimize.source.folder import load_folder

        return load_folder(Path(reference))
    work = as_work(work)
    digest = work.registry.resolve(reference).digest if "@" in reference else reference
    artifact = work.store.open(digest)
    work.store.verify(artifact)
    return artifact
