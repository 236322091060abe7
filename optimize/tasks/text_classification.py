"""Text classification: one sentence or a pair of them, one label out of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.metrics import ACCURACY, MACRO_F1, MATTHEWS
from optimize.tasks import Features, Inputs, Metric, Task
from optimize.tasks.columns import labels, listed, texts
from optimize.tasks.heads import answers, has_head
from optimize.tasks.padding import exact_length, pad, tokenize
from optimize.tasks.pretrained import load_model, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

HEAD = "ForSequenceClassification"


class TextClassificationData(DataConfig):
    """The `data` block of `task: text-classification`."""

    text: str = "text"
    """The column of the text, or of the first of two."""
    text_pair: str | None = None
    """The column of the second text, where two are classified together."""
    label: str = "label"
    """The column of the label: a name, or a whole number."""
    labels: list[str] | dict[str | int, str] | None = None
    """The labels' names in the order of the model's outputs; or value in the data -> name, in that order (several
    values may share a name). The default is what the data holds, sorted."""
    max_length: int = Field(128, ge=1)
    """Tokens a row, at most; the rest is cut."""


class TextClassification(Task):
    """`spec`: {"name", "max_length": tokens, "labels": names in the order of the model's outputs}.

    Rows have the columns `text`, `text_pair` where there are two, and `label` (int64: the index of the name).
    """

    name: ClassVar[str] = "text-classification"
    Data: ClassVar[type[DataConfig]] = TextClassificationData
    metrics: ClassVar[Mapping[str, Metric]] = {metric.name: metric for metric in (ACCURACY, MACRO_F1, MATTHEWS)}
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    per_row: ClassVar[bool] = True

    # Rows

    def prepare(self, table: pa.Table, config: TextClassificationData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        columns = {"text": config.text, "text_pair": config.text_pair, "label": config.label}
        for key, column in columns.items():
            if column is not None and column not in table.column_names:
                raise SourceError(
                    f"the data has no column {column!r} for `data.{key}`",
                    hint=f"choose one of {', '.join(map(repr, table.column_names))}",
                )
        prepared = {
            key: texts(table[column], column)
            for key, column in columns.items()
            if column is not None and key != "label"
        }
        names, indices = labels(table, config.label, config.labels)
        return pa.table({**prepared, "label": pa.array(indices, pa.int64())}), {"labels": names}

    def spec(self, config: TextClassificationData, info: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": self.name, "max_length": config.max_length, "labels": list(info["labels"])}

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Strings, pairs of strings, or dictionaries with `text` and `text_pair`: all of one kind."""
        import pyarrow as pa

        rows = []
        for value in inputs:
            if isinstance(value, str):
                rows.append((value,))
            elif isinstance(value, Mapping):
                rows.append(tuple(value[key] for key in ("text", "text_pair") if key in value))
            else:
                rows.append(tuple(value))
        width = {len(row) for row in rows}
        if width not in ({1}, {2}, set()) or not all(isinstance(text, str) for row in rows for text in row):
            raise OptimizeError(
                "inputs must be all single texts or all pairs of texts",
                hint='give ["a fine film"], [("premise", "hypothesis")] or [{"text": ..., "text_pair": ...}]',
            )
        names = ("text", "text_pair")[: max(width, default=1)]
        return pa.table({name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        return has_head(path, HEAD, spec["labels"])

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        names = spec["labels"]
        return load_model(
            "AutoModelForSequenceClassification",
            path,
            trained=self.check_source(path, spec),
            trust_remote_code=trust_remote_code,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        return load_tokenizer(path, trust_remote_code=trust_remote_code)

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        return tokenize(preprocessor, *_texts(rows), max_length=spec["max_length"])

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        return pad(preprocessor, features, length)

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        return exact_length(preprocessor, _texts(rows), batch_size=batch_size, sequence_length=sequence_length)

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[np.float32]:
        """Logits [batch, labels]."""
        if "logits" not in raw:
            raise EvaluationError(f"the model gives no `logits`, but {listed(raw)}")
        return raw["logits"].astype("float32", copy=False)

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """The index of each row's label [n]."""
        return rows["label"].to_numpy()  # type: ignore[no-any-return]

    def answers(self, outputs: NDArray[np.float32], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"label": name, "score": its probability}], a row each."""
        return answers(outputs, spec["labels"])


def _texts(rows: pa.Table) -> list[list[str]]:
    """The columns of text: one or two."""
    return [rows[name].to_pylist() for name in ("text", "text_pair") if name in rows.column_names]
