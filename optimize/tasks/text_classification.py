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
from optimize.tasks.pretrained import first_line, load_tokenizer, read_config

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
        config = read_config(path / "config.json")
        try:
            if not any(name.endswith(HEAD) for name in config.get("architectures") or ()):
                return False
            # transformers leaves the names out of config.json where they are these.
            named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))}
            theirs = [str(named[i]) for i in sorted(named, key=int)]
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise SourceError(f"config.json makes no sense: {error}", location=str(path)) from error
        if (kind := config.get("problem_type")) in ("regression", "multi_label_classification"):
            raise SourceError(f"the model's head is for {kind.replace('_', ' ')}, not for one label")
        ours = list(spec["labels"])
        numbers = [str(i) for i in range(len(theirs))]
        generic = theirs == [f"LABEL_{i}" for i in range(len(theirs))]
        if theirs == ours or (generic and ours == numbers):
            return True
        told = f"labels that don't match the model: the data has {listed(ours)}, the model {listed(theirs)}"
        if sorted(theirs) == sorted(ours):
            raise SourceError(f"{told}, in another order", hint=f"set data.labels in the model's order: {theirs}")
        if generic and len(theirs) == len(ours):
            example = ", ".join(f"{a}: {b}" for a, b in zip(ours, theirs, strict=True))
            raise SourceError(told, hint=f"say which is which, as in data.labels: {{{example}}}")
        raise SourceError(
            told,
            hint="map the data's values to the model's names with data.labels (value: name), in the model's order, "
            "or start from a model without a classification head",
        )

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        from optimize.quiet import quiet

        names = spec["labels"]
        try:
            with quiet():
                model, loading = AutoModelForSequenceClassification.from_pretrained(
                    path,
                    dtype=torch.float32,
                    num_labels=len(names),
                    id2label=dict(enumerate(names)),
                    label2id={name: i for i, name in enumerate(names)},
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers, safetensors and torch each raise their own
            raise SourceError(f"the model can't be loaded: {first_line(error)}", location=str(path)) from error
        missing = sorted(loading["missing_keys"])
        if missing and self.check_source(path, spec):
            raise SourceError(f"the weights of {', '.join(missing[:5])} are missing", location=str(path))
        return model.eval()

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        return load_tokenizer(path, trust_remote_code=trust_remote_code)

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        return self._encode(preprocessor, rows, min(spec["max_length"], preprocessor.model_max_length))

    def _encode(self, preprocessor: Any, rows: pa.Table, max_length: int) -> list[Features]:
        columns = [rows[name].to_pylist() for name in ("text", "text_pair") if name in rows.column_names]
        encoded = preprocessor(*columns, truncation=True, max_length=max_length, padding=False)
        return [{name: encoded[name][row] for name in encoded} for row in range(rows.num_rows)]

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        import numpy as np

        fill = {"input_ids": preprocessor.pad_token_id or 0, "token_type_ids": preprocessor.pad_token_type_id}
        left = preprocessor.padding_side == "left"
        width = length or max(len(row["input_ids"]) for row in features)
        batch: Inputs = {}
        for name in features[0]:
            array = np.full((len(features), width), fill.get(name, 0), dtype=np.int64)
            for i, row in enumerate(features):
                values = row[name][:width]
                start = width - len(values) if left else 0
                array[i, start : start + len(values)] = values
            batch[name] = array
        return batch

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        import pyarrow as pa

        if sequence_length > preprocessor.model_max_length:
            raise EvaluationError(
                f"sequence_length {sequence_length} is longer than the model's {preprocessor.model_max_length} tokens",
                hint=f"set evaluate.latency.sequence_length to at most {preprocessor.model_max_length}",
            )
        chosen = rows.take([i % rows.num_rows for i in range(batch_size)])
        repeated = {
            name: pa.array([" ".join([text] * sequence_length) for text in chosen[name].to_pylist()])
            for name in ("text", "text_pair")
            if name in chosen.column_names
        }
        features = self._encode(preprocessor, pa.table(repeated), sequence_length)
        if any(len(row["input_ids"]) != sequence_length for row in features):
            raise EvaluationError("a row has text in which the tokenizer finds nothing", hint="filter such rows out")
        return self.collate(preprocessor, features)

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
        import numpy as np

        powers = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)
        best = shares.argmax(axis=1)
        return [{"label": spec["labels"][i], "score": float(row[i])} for row, i in zip(shares, best, strict=True)]
