"""One file a task. A task knows its rows, its inputs, its outputs and its metrics; it knows no format.

`model.task: text-classification` in a recipe is `optimize/tasks/text_classification.py`. Third parties add a task with
an entry point in the group `optimize.tasks` whose value is a `Task` subclass.

Importing a task's module must stay cheap (no torch, no transformers): `validate` does it to know the schema of `data`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.calibration import Calibration
    from optimize.data import DataConfig
    from optimize.runtimes import Runner

Features = dict[str, Any]
"""One row on its way to the model, unpadded: name -> a list of numbers as long as the row (token ids), or what
`collate` makes an array of (the bytes of an image file)."""
Inputs = dict[str, "NDArray[Any]"]
"""A collated batch: name -> array [batch, ...], of int64 (token ids [batch, length]) or float32 (pixels [batch,
channels, height, width])."""


@dataclass(frozen=True)
class Metric:
    """A number that says how good the answers are.

    `kind` decides the interval: `binary` (a mean of 0/1 outcomes a row: Tango), `rows` (a mean of numbers a row: paired
    bootstrap), `sums` (a function of sums over rows, such as perplexity: paired bootstrap over rows) or `set` (a number
    only a set of rows has, such as F1: the same, slower).
    """

    name: str
    higher_is_better: bool
    kind: Literal["binary", "rows", "sums", "set"]
    compute: Callable[[NDArray[Any], NDArray[Any]], float]
    """(outputs [n, ...], targets [n, ...]) -> the number."""
    per_row: Callable[[NDArray[Any], NDArray[Any]], NDArray[np.float64]] | None = None
    """(outputs, targets) -> one number a row [n], required for `binary` and `rows`; for `sums`, and for a `set` metric
    with `from_rows`, several [n, k]."""
    from_sums: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None
    """For `sums`: what `per_row` gives, summed over rows [..., k] -> the same numbers as `compute`, [...]."""
    from_rows: Callable[[NDArray[np.float64]], float] | None = None
    """For a `set` metric that looks at little of each row: what `per_row` gives of it [n, k] -> the same number as
    `compute`."""
    from_confusion: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None
    """For a `set` metric of classes, which is what the outputs' last axis stands for: counts [..., target, answer] ->
    the same numbers as `compute`, [...]. Makes the bootstrap a hundred times faster."""


class Task(ABC):
    """What a later task implements. Instances are stateless; `spec` travels with the artifact."""

    name: ClassVar[str]
    VERSION: ClassVar[int] = 1
    """Raised when the same rows would be read or made into other inputs than before; part of every key."""
    Data: ClassVar[type[DataConfig]]
    """The recipe's `data` block: the common keys and the task's own columns."""
    metrics: ClassVar[Mapping[str, Metric]]
    default_metrics: ClassVar[tuple[str, ...]]
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions beyond the base install that its rows need, and `extra`, which installs them."""
    extra: ClassVar[str | None] = None
    plain_modules: ClassVar[bool] = False
    """Whether a PyTorch module of the user's own (`model.module`) can do it."""
    has_length: ClassVar[bool] = True
    """Whether inputs have a length in tokens; then `sequence_length` is part of what is timed."""
    generates: ClassVar[bool] = False
    """Whether models of this task write, a token at a time: then `prefill` and `decode` are what is timed."""
    encodes: ClassVar[bool] = False
    """Whether they write what an encoder makes of a text, rather than go on with it."""
    per_row: ClassVar[bool] = False
    """Whether an output is of a whole row, whatever tokens that is cut into."""
    options: ClassVar[tuple[str, ...]] = ()
    """Keys of the spec that `predict` may be told in place of what the recipe said."""
    unit: ClassVar[str] = "evaluation rows"
    """What outputs are of, in messages."""
    files: ClassVar[tuple[str, ...]] = ()
    """Globs of small files in a model's folder that this task reads besides those that all do."""
    notes: ClassVar[tuple[str, ...]] = ()
    """Columns that no model reads, such as the right answer or where a row came from: two rows that differ in nothing
    else are the same."""
    passage: ClassVar[int] = 0
    """Characters from which on a text that two splits share is a leak; shorter rows count together with those that
    follow. 0: every row counts."""

    def derive(self, table: pa.Table, config: Any) -> pa.Table:
        """Rows made of the source's own, where the recipe asks for that; else the very same table."""
        return table

    @abstractmethod
    def prepare(self, table: pa.Table, config: Any) -> tuple[pa.Table, dict[str, Any]]:
        """Rename and check columns; give the rows in the task's own columns, and facts about them (such as `labels`).

        As many rows as given, in their order. A column `label` is what rows are stratified by; all others are inputs.

        Raises `SourceError` for a missing column, an empty cell or labels that can't be read.
        """

    @abstractmethod
    def spec(self, config: Any, info: Mapping[str, Any]) -> dict[str, Any]:
        """`Artifact.task` for artifacts of this recipe: {"name", "max_length", "labels", ...}."""

    def evaluation_spec(self, spec: Mapping[str, Any], info: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `encode` is told of evaluation rows: an artifact's spec, and what the recipe wants of scoring alone.

        `info` is what `prepare` found. What is added here changes no artifact.
        """
        return spec

    @abstractmethod
    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        """Read the source model's `config.json`; True where its head is already trained for these labels.

        False means that a head must be made (and trained) first. Raises `SourceError` where labels contradict the data.
        Imports no torch.
        """

    @abstractmethod
    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        """The torch model in float32, in evaluation mode, with the labels of `spec` (a new head where it has none)."""

    @abstractmethod
    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        """The tokenizer (or image processor) that lies in an artifact's folder."""

    @abstractmethod
    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """Rows -> model inputs, unpadded: one a row, or, of a running text, one a window."""

    @abstractmethod
    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        """Pad to the longest row of the batch, or to exactly `length` (longer rows are cut)."""

    def batches(
        self, preprocessor: Any, features: Sequence[Features], batch_size: int
    ) -> Iterator[tuple[list[int], Inputs]]:
        """(row numbers, collated inputs), sorted by length so that padding is not computed."""
        order = sorted(range(len(features)), key=lambda row: -max(len(column) for column in features[row].values()))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows, self.collate(preprocessor, [features[row] for row in rows])

    def calibration(
        self, preprocessor: Any, rows: pa.Table, path: Path, spec: Mapping[str, Any], calibration: Calibration
    ) -> list[Features]:
        """`calibration.num_samples` rows drawn with its seed, cut to its `max_length`; fewer where there are no more.

        `path` is the folder of the artifact, whose `config.json` says what the model can take.
        """
        chosen = random.Random(calibration.seed).sample(
            range(rows.num_rows), min(calibration.num_samples, rows.num_rows)
        )
        shorter = {**spec, "max_length": min(spec.get("max_length", calibration.max_length), calibration.max_length)}
        return self.encode(preprocessor, rows.take(chosen), shorter)

    @abstractmethod
    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        """One batch of real rows, every one exactly `sequence_length` long (repeated and cut, never padding)."""

    @abstractmethod
    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[Any]:
        """A runtime's arrays -> one output an input: numbers such as logits [batch, labels], or records [batch]."""

    def answer(
        self, runner: Runner, preprocessor: Any, inputs: Inputs, spec: Mapping[str, Any]
    ) -> Sequence[Any] | NDArray[Any]:
        """What the model makes of a batch, an output an input. One call, unless the task writes a text step by step."""
        return self.read_outputs(runner.run(inputs), inputs)

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[Any]:
        """What is kept, scored and compared: of all inputs' outputs, in the inputs' order, one output a row [n, ...].

        As they are, unless outputs differ in shape or several inputs (windows of a long text) make one row.
        """
        import numpy as np

        return np.stack(outputs)

    def respond(
        self,
        runner: Runner,
        preprocessor: Any,
        rows: pa.Table,
        spec: Mapping[str, Any],
        *,
        batch_size: int,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> NDArray[Any]:
        """The outputs of rows through an open runner, [n, ...]; `on_batch` is told (inputs done, inputs in all).

        Raises `EvaluationError` where the rows have nothing to answer to.
        """
        features = self.encode(preprocessor, rows, spec)
        if not features:
            raise EvaluationError("the rows have nothing to answer to")
        outputs: list[Any] = [None] * len(features)
        done = 0
        for numbers, inputs in self.batches(preprocessor, features, batch_size):
            for number, output in zip(numbers, self.answer(runner, preprocessor, inputs, spec), strict=True):
                outputs[number] = output
            done += len(numbers)
            on_batch(done, len(features))
        return self.combine(outputs, features, rows, spec)

    @abstractmethod
    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """What the answers are held against, [n, ...]; empty where outputs are records that hold it themselves."""

    def examples(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """Rows to train on: inputs, each with what the model's own loss wants beside it (`labels`)."""
        features = self.encode(preprocessor, rows, spec)
        return [{**row, "labels": label} for row, label in zip(features, self.targets(rows).tolist(), strict=True)]

    def collate_examples(self, preprocessor: Any, examples: Sequence[Features]) -> Inputs:
        """`collate` for what `examples` gives."""
        import numpy as np

        features = [{name: value for name, value in row.items() if name != "labels"} for row in examples]
        return {**self.collate(preprocessor, features), "labels": np.array([row["labels"] for row in examples])}

    @abstractmethod
    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What `predict` returns for each row, such as {"label": "positive", "score": 0.98}."""

    def metric_fault(self, metric: str, config: Any) -> tuple[str, str] | None:
        """(why rows of such a `data` block do not have this metric of the task, what to try), or None where they do."""
        return None

    def incomparable(self, outputs: NDArray[Any], reference: NDArray[Any]) -> str | None:
        """Why two models' outputs do not answer the same, or None where they do."""
        if outputs.shape == reference.shape:
            return None
        return f"its outputs are {list(outputs.shape)}, the other's {list(reference.shape)}"

    def differences(self, outputs: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
        """The largest absolute difference of each output from a reference's, [n]; NaN where one is no number."""
        import numpy as np

        return np.abs(outputs.astype(np.float64) - reference).reshape(len(outputs), -1).max(axis=1)  # type: ignore[no-any-return]

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        """How far the outputs lie from a reference's; JSON."""
        from optimize.evaluate.fidelity import fidelity

        return fidelity(outputs, reference)

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]] | None:
        """What a person wants to look at: where the answer is another than the reference's, each with its input.

        None where an output has no top answer.
        """
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            return None
        flipped = (outputs.argmax(axis=1) != reference.argmax(axis=1)).nonzero()[0]
        if not len(flipped):
            return []
        before, after = (self.answers(answers[flipped], spec) for answers in (reference, outputs))
        return [
            {"row": row, **columns, "baseline": then, "candidate": now}
            for row, columns, then, now in zip(
                flipped.tolist(), rows.take(flipped).to_pylist(), before, after, strict=True
            )
        ]

    @abstractmethod
    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """What a person gives to `predict` (strings, pairs or dictionaries) as rows in the task's columns."""


TASKS: dict[str, tuple[str, str]] = {
    "text-classification": ("optimize.tasks.text_classification", "TextClassification"),
    "causal-lm": ("optimize.tasks.causal_lm", "CausalLM"),
    "image-classification": ("optimize.tasks.image_classification", "ImageClassification"),
    "token-classification": ("optimize.tasks.token_classification", "TokenClassification"),
    "fill-mask": ("optimize.tasks.fill_mask", "FillMask"),
    "sentence-similarity": ("optimize.tasks.sentence_similarity", "SentenceSimilarity"),
    "summarization": ("optimize.tasks.seq2seq", "Summarization"),
    "text2text": ("optimize.tasks.seq2seq", "TextToText"),
    "question-answering": ("optimize.tasks.question_answering", "QuestionAnswering"),
}


def names() -> tuple[str, ...]:
    from importlib.metadata import entry_points

    return (*TASKS, *(point.name for point in entry_points(group="optimize.tasks")))


@cache
def get(name: str) -> Task:
    """The task of that name. Raises `KeyError` where there is none."""
    if name in TASKS:
        module, cls = TASKS[name]
        return getattr(import_module(module), cls)()  # type: ignore[no-any-return]
    from importlib.metadata import entry_points

    for point in entry_points(group="optimize.tasks", name=name):
        return point.load()()  # type: ignore[no-any-return]
    raise KeyError(name)
