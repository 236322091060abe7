"""Sentence similarity: a vector for each text, near to those of texts that mean the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.similarity import RECALL_AT_1, RECALL_AT_5, RECALL_AT_10, SPEARMAN, cosines
from optimize.tasks import Features, Inputs, Metric, Task
from optimize.tasks.columns import listed, refuse_rows, texts
from optimize.tasks.padding import exact_length, pad, tokenize
from optimize.tasks.pooling import EMBEDDING, MODULES, Mode, copy_pooling, pool_in_model, pooled_tokens, pooling_of
from optimize.tasks.pretrained import architectures, load_model, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.calibration import Calibration

POOLED = "pooled"
"""What an input says besides the model's own: which of its tokens make the text's vector."""


class SentenceSimilarityData(DataConfig):
    """The `data` block of `task: sentence-similarity`."""

    text: str = "text"
    """The column of the first text, or of a query."""
    text_pair: str = "text_pair"
    """The column of the second text, or of what the query should find."""
    score: str | None = None
    """The column that says how much alike people think the two, on any scale, higher for more: then `spearman` is
    measured. Without it a row's texts belong together, and `recall_at_1`, `recall_at_5` and `recall_at_10` are."""
    pooling: Mode | None = None
    """How the tokens' vectors become the text's: their `mean`, or the first (`cls`) or the last one. The default is
    what the model's `1_Pooling/config.json` says."""
    max_length: int = Field(128, ge=1)
    """Tokens a text, at most; the rest is cut."""


class SentenceSimilarity(Task):
    """`spec`: {"name", "max_length": tokens, "pooling": as in the recipe, or None}.

    Rows have the columns `text` and `text_pair`, and `label` (float64) where people have scored them. Each text is an
    input of its own. Exported files give vectors of texts (`sentence_embedding`); where a format gives those of tokens
    (`last_hidden_state`) they are pooled afterwards, with the same result.
    """

    name: ClassVar[str] = "sentence-similarity"
    Data: ClassVar[type[DataConfig]] = SentenceSimilarityData
    metrics: ClassVar[Mapping[str, Metric]] = {
        metric.name: metric for metric in (SPEARMAN, RECALL_AT_1, RECALL_AT_5, RECALL_AT_10)
    }
    default_metrics: ClassVar[tuple[str, ...]] = ("spearman",)
    files: ClassVar[tuple[str, ...]] = (MODULES, "*_Pooling/config.json")

    # Rows

    def prepare(self, table: pa.Table, config: SentenceSimilarityData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        for key in ("text", "text_pair", "score"):
            column = getattr(config, key)
            if column is not None and column not in table.column_names:
                raise SourceError(
                    f"the data has no column {column!r} for `data.{key}`",
                    hint=f"choose one of {', '.join(map(repr, table.column_names))}",
                )
        rows = {key: texts(table[getattr(config, key)], getattr(config, key)) for key in ("text", "text_pair")}
        if config.score is not None:
            rows["label"] = _scores(table[config.score], config.score)
        return pa.table(rows), {}

    def spec(self, config: SentenceSimilarityData, info: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": self.name, "max_length": config.max_length, "pooling": config.pooling}

    def metric_fault(self, metric: str, config: SentenceSimilarityData) -> tuple[str, str] | None:
        if metric == SPEARMAN.name and config.score is None:
            return "`spearman` needs people's scores", "name their column in `data.score`, or measure `recall_at_1`"
        if metric != SPEARMAN.name and metric in self.metrics and config.score is not None:
            return f"`{metric}` is of pairs that belong together, not of scored ones", "leave out `data.score`"
        return None

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Strings, pairs of strings, or dictionaries with `text` and `text_pair`: all of one kind."""
        import pyarrow as pa

        rows: list[tuple[Any, ...]] = []
        for value in inputs:
            if isinstance(value, Mapping):
                rows.append(tuple(value[key] for key in ("text", "text_pair") if key in value))
            else:
                rows.append((value,) if isinstance(value, str) else tuple(value))
        width = {len(row) for row in rows}
        if width not in ({1}, {2}) or not all(isinstance(text, str) for row in rows for text in row):
            raise OptimizeError(
                "inputs must be all single texts or all pairs of texts",
                hint='give ["a fine film"], [("a fine film", "a good movie")] or [{"text": ..., "text_pair": ...}]',
            )
        columns = zip(("text", "text_pair"), zip(*rows, strict=True), strict=False)
        return pa.table({name: pa.array(column, pa.string()) for name, column in columns})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        found = architectures(path)
        if not any(name.endswith("Model") for name in found):
            raise SourceError(
                f"the model gives no vectors: it is {listed(found) or 'of no architecture'}",
                location=str(path),
                hint="take one without a head, such as those of sentence-transformers",
            )
        _pooling(pooling_of(path), spec, path)
        return True

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        model = load_model("AutoModel", path, trained=True, trust_remote_code=trust_remote_code)
        return pool_in_model(model, _pooling(pooling_of(path), spec, path))

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        """The tokenizer. It knows the folder's pooling, and saves what says so beside itself."""
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        tokenizer.pooling = pooling_of(path)
        save = tokenizer.save_pretrained

        def save_with_pooling(folder: Any, **settings: Any) -> Any:
            copy_pooling(path, Path(folder))
            return save(folder, **settings)

        tokenizer.save_pretrained = save_with_pooling
        return tokenizer

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """A row's texts behind each other: the model's inputs, and `pooled`."""
        mode = _pooling(preprocessor.pooling, spec)
        column = [text for row in _texts(rows) for text in row]
        features = tokenize(preprocessor, column, max_length=spec["max_length"])
        return [{**row, POOLED: pooled_tokens(mode, len(row["input_ids"]))} for row in features]

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        return pad(preprocessor, features, length, side="right")

    def calibration(
        self, preprocessor: Any, rows: pa.Table, path: Path, spec: Mapping[str, Any], calibration: Calibration
    ) -> list[Features]:
        """As many texts as rows are asked for: the first ones of the drawn rows."""
        features = super().calibration(preprocessor, rows, path, spec, calibration)[: calibration.num_samples]
        return [{name: values for name, values in row.items() if name != POOLED} for row in features]

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        columns = [rows["text"].to_pylist()]
        return exact_length(preprocessor, columns, batch_size=batch_size, sequence_length=sequence_length)

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[np.float32]:
        """Vectors of texts, [batch, D], of length 1."""
        import numpy as np

        if EMBEDDING in raw:
            return raw[EMBEDDING].astype(np.float32, copy=False)
        if "last_hidden_state" not in raw:
            raise EvaluationError(f"the model gives no `{EMBEDDING}` and no `last_hidden_state`, but {listed(raw)}")
        pooled = inputs[POOLED][..., None] > 0
        # The sum points where the mean does.
        vectors = np.where(pooled, raw["last_hidden_state"], 0).sum(axis=1, dtype=np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)  # type: ignore[no-any-return]

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """The vectors of each row's texts, [n, texts, D]."""
        import numpy as np

        vectors = np.stack(outputs)
        return vectors.reshape(rows.num_rows, -1, vectors.shape[-1])

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """People's scores [n]; nothing where there are none."""
        import numpy as np

        return rows["label"].to_numpy() if "label" in rows.column_names else np.empty(0)

    def answers(self, outputs: NDArray[np.float32], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"embedding": its vector, of length 1}] for a text, [{"similarity": the cosine}] for a pair."""
        if outputs.shape[1] == 1:
            return [{"embedding": vector} for vector in outputs[:, 0].tolist()]
        return [{"similarity": cosine} for cosine in cosines(outputs).tolist()]

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        """`cosine_distance`: of each text's vectors, 1 - cosine; `difference`: of a pair's similarity, absolute."""
        import numpy as np

        from optimize.evaluate.fidelity import spread

        together = np.stack([vectors.reshape(-1, vectors.shape[-1]) for vectors in (outputs, reference)], axis=1)
        return {
            "n": len(outputs),
            "cosine_distance": spread(np.maximum(1 - cosines(together), 0)),
            "difference": spread(np.abs(cosines(outputs) - cosines(reference))),
        }

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> None:
        """None: a similarity has no top answer."""


def _pooling(said: Mode | None, spec: Mapping[str, Any], path: Path | None = None) -> Mode:
    """The recipe's, else the model folder's. Raises `SourceError` where neither says one."""
    mode: Mode | None = spec.get("pooling") or said
    if mode is None:
        raise SourceError(
            "nothing says how tokens are pooled to a sentence",
            location=str(path) if path else None,
            hint="set data.pooling: mean, or what the model was trained with",
        )
    return mode


def _texts(rows: pa.Table) -> list[tuple[str, ...]]:
    """Each row's one or two texts."""
    columns = [rows[name].to_pylist() for name in ("text", "text_pair") if name in rows.column_names]
    return list(zip(*columns, strict=True))


def _scores(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Finite numbers. Raises `SourceError`."""
    import pyarrow as pa

    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise SourceError(f"column {name!r} holds {column.type}, not numbers", hint="choose the column with the score")
    refuse_rows("no score", name, (value is None or not math.isfinite(value) for value in column.to_pylist()))
    return column.cast(pa.float64())
