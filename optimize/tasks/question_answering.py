"""Extractive question answering: the passage of a context that answers a question, or none (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.squad import EXACT_MATCH, F1
from optimize.tasks import Features, Inputs, Metric, Task, written
from optimize.tasks.columns import listed, refuse_rows, texts
from optimize.tasks.padding import pad
from optimize.tasks.pretrained import architectures, load_model, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.calibration import Calibration

HEAD = "ForQuestionAnswering"
ROW, BEGINS, ENDS, NOTHING = "row", "begins", "ends", "nothing"
"""What a window says besides the model's inputs: its row; for each token the characters of the context at which it
begins and ends (-1 outside of the context); the token that stands for no answer."""
_OURS = (ROW, BEGINS, ENDS, NOTHING)
_LABELS = ("start_positions", "end_positions")


class QuestionAnsweringData(DataConfig):
    """The `data` block of `task: question-answering`."""

    question: str = "question"
    """The column of the question."""
    context: str = "context"
    """The column of the text that holds the answer."""
    answers: str = "answers"
    """The column of the accepted answers: a text, several, or SQuAD's `{text: [...], answer_start: [...]}`. Empty where
    the context does not answer the question."""
    cloze: bool = False
    """Make questions of running text instead (the column `context`): a sentence with a name or a number blanked out,
    which is the answer. Such rows have no other columns."""
    max_length: int = Field(384, ge=32)
    """Tokens of a question and a piece of its context, at most; a longer context is cut into windows."""
    stride: int = Field(128, ge=1)
    """Tokens of the context that two neighbouring windows share."""
    max_question_length: int = Field(64, ge=1)
    """Tokens of a question, at most; the rest is cut."""
    max_answer_length: int = Field(30, ge=1)
    """Tokens of an answer, at most."""

    @model_validator(mode="after")
    def _windows_advance(self) -> QuestionAnsweringData:
        if self.stride + self.max_question_length + _SPECIAL >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length} leaves a window no room to advance behind a question of "
                f"{self.max_question_length} tokens and a stride of {self.stride}"
            )
        return self


_SPECIAL = 8
"""Special tokens around a question and a context, at most."""


class QuestionAnswering(Task):
    """`spec`: {"name", "max_length", "stride", "max_question_length", "max_answer_length": tokens, "unanswerable"}.

    Rows have the columns `question`, `context`, `answers` (texts), and `start` and `end`: the characters of the first
    accepted answer that stands in the context, -1 where there is none. A long context is several windows, all of which
    are asked; the likeliest span of any of them is the row's answer. Where rows of the data are `unanswerable`, the
    model may give none, as in SQuAD 2.0.
    """

    name: ClassVar[str] = "question-answering"
    Data: ClassVar[type[DataConfig]] = QuestionAnsweringData
    metrics: ClassVar[Mapping[str, Metric]] = {metric.name: metric for metric in (EXACT_MATCH, F1)}
    default_metrics: ClassVar[tuple[str, ...]] = ("exact_match", "f1")
    notes: ClassVar[tuple[str, ...]] = ("answers", "start", "end")

    # Rows

    def derive(self, table: pa.Table, config: QuestionAnsweringData) -> pa.Table:
        if not config.cloze or config.context not in table.column_names:
            return table
        import pyarrow as pa

        from optimize.tasks.cloze import questions

        names = {"question": config.question, "context": config.context, "answers": config.answers}
        made = questions(table[config.context].to_pylist())
        if not made:
            raise SourceError("no question can be made of the text", hint="take whole paragraphs, not lines of a poem")
        return pa.Table.from_pylist([{names[key]: value for key, value in row.items()} for row in made])

    def prepare(self, table: pa.Table, config: QuestionAnsweringData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        for key in ("question", "context", "answers"):
            if getattr(config, key) not in table.column_names:
                raise SourceError(
                    f"the data has no column {getattr(config, key)!r} for `data.{key}`",
                    hint=f"choose one of {', '.join(map(repr, table.column_names))}",
                )
        contexts = texts(table[config.context], config.context)
        found = [
            _found(value, context)
            for value, context in zip(table[config.answers].to_pylist(), contexts.to_pylist(), strict=True)
        ]
        refuse_rows(
            "an answer that does not stand in the context",
            config.answers,
            (bool(answers) and start < 0 for answers, start, _ in found),
            hint="filter these rows out: the answer has to be a piece of the context, letter by letter",
        )
        answers, starts, ends = zip(*found, strict=True) if found else ((), (), ())
        rows = pa.table(
            {
                "question": texts(table[config.question], config.question),
                "context": contexts,
                "answers": pa.array(answers, pa.list_(pa.string())),
                "start": pa.array(starts, pa.int64()),
                "end": pa.array(ends, pa.int64()),
            }
        )
        return rows, {"unanswerable": not all(answers)}

    def spec(self, config: QuestionAnsweringData, info: Mapping[str, Any]) -> dict[str, Any]:
        lengths = ("max_length", "stride", "max_question_length", "max_answer_length")
        return {
            "name": self.name,
            **{name: getattr(config, name) for name in lengths},
            "unanswerable": bool(info["unanswerable"]),
        }

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Dictionaries with `question` and `context`, or pairs of them."""
        import pyarrow as pa

        pairs = [
            (value.get("question"), value.get("context")) if isinstance(value, Mapping) else tuple(value)
            for value in inputs
        ]
        if not all(len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair) for pair in pairs):
            raise OptimizeError(
                "inputs must have a question and a context", hint='give [{"question": "Who?", "context": "It was I."}]'
            )
        columns = zip(("question", "context"), zip(*pairs, strict=True), strict=True)
        return pa.table({name: pa.array(column, pa.string()) for name, column in columns})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        return any(name.endswith(HEAD) for name in architectures(path))

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        return load_model(
            "AutoModelForQuestionAnswering",
            path,
            trained=self.check_source(path, spec),
            trust_remote_code=trust_remote_code,
        )

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if not tokenizer.is_fast:
            raise SourceError(
                "the tokenizer does not tell which characters its tokens are, so that no answer can be cut out",
                location=str(path),
                hint="take a model with a tokenizer.json",
            )
        return tokenizer

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """Windows, a row's behind each other: the model's inputs, and `row`, `begins`, `ends` and `nothing`."""
        length = min(spec["max_length"], preprocessor.model_max_length)
        questions = _cut(preprocessor, rows["question"].to_pylist(), min(spec["max_question_length"], length // 4))
        encoded = preprocessor(
            questions,
            rows["context"].to_pylist(),
            truncation="only_second",
            max_length=length,
            stride=min(spec["stride"], length // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        return [_window(preprocessor, encoded, i) for i in range(len(encoded["input_ids"]))]

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        inputs = [{name: row[name] for name in row if name not in _OURS} for row in features]
        return pad(preprocessor, inputs, length, side="right")

    def calibration(
        self, preprocessor: Any, rows: pa.Table, path: Path, spec: Mapping[str, Any], calibration: Calibration
    ) -> list[Features]:
        """As many windows as rows are asked for: the first ones of the drawn rows."""
        return super().calibration(preprocessor, rows, path, spec, calibration)[: calibration.num_samples]

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        if sequence_length > preprocessor.model_max_length:
            raise EvaluationError(
                f"sequence_length {sequence_length} is longer than the model's {preprocessor.model_max_length} tokens",
                hint=f"set evaluate.latency.sequence_length to at most {preprocessor.model_max_length}",
            )
        chosen = rows.take([i % rows.num_rows for i in range(batch_size)])
        contexts = [
            " ".join([text] * sequence_length)[: 64 * sequence_length] for text in chosen["context"].to_pylist()
        ]
        questions = _cut(preprocessor, chosen["question"].to_pylist(), max(1, sequence_length // 4))
        encoded = preprocessor(questions, contexts, truncation="only_second", max_length=sequence_length)
        if any(len(ids) != sequence_length for ids in encoded["input_ids"]):
            raise EvaluationError("a row has text in which the tokenizer finds nothing", hint="filter such rows out")
        return self.collate(preprocessor, [{name: encoded[name][i] for name in encoded} for i in range(batch_size)])

    # Training

    def examples(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """Windows with `start_positions` and `end_positions`: the tokens of the answer, or twice the one that stands
        for no answer where the window does not hold all of it.
        """
        starts, ends = rows["start"].to_pylist(), rows["end"].to_pylist()
        found = []
        for window in self.encode(preprocessor, rows, spec):
            (row,), (nothing,) = window[ROW], window[NOTHING]
            span = _tokens_of(window, starts[row], ends[row]) or (nothing, nothing)
            found.append({**window, **dict(zip(_LABELS, span, strict=True))})
        return found

    def collate_examples(self, preprocessor: Any, examples: Sequence[Features]) -> Inputs:
        import numpy as np

        inputs = [{name: row[name] for name in row if name not in _LABELS} for row in examples]
        labels = {name: np.array([row[name] for row in examples]) for name in _LABELS}
        return {**self.collate(preprocessor, inputs), **labels}

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[np.float32]:
        """Logits [batch, length, 2] of every token to begin and to end the answer; 0 where a window is padded."""
        import numpy as np

        if missing := [name for name in ("start_logits", "end_logits") if name not in raw]:
            raise EvaluationError(f"the model gives no `{missing[0]}`, but {listed(raw)}")
        logits = np.stack([raw["start_logits"], raw["end_logits"]], axis=-1).astype(np.float32, copy=False)
        return np.asarray(logits * inputs["attention_mask"][..., None].astype(np.float32))

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[Any]:
        """A record a row: the answer's `text`, where it stands in the context (`start`, `end`: characters; -1 for
        none), and its `score`: the share that its span has among all that the row's windows allow.
        """
        import numpy as np

        contexts = rows["context"].to_pylist()
        best = np.full(len(contexts), -np.inf)
        total, nothing = best.copy(), np.full(len(contexts), np.inf)
        places = np.full((len(contexts), 2), -1, dtype=np.int32)
        with np.errstate(invalid="ignore"):  # a logit that is no number makes a score that is none
            for logits, window in zip(outputs, features, strict=True):
                (row,), (none,) = window[ROW], window[NOTHING]
                logit, span, all_spans = likeliest_span(logits, window[BEGINS], spec["max_answer_length"])
                nothing[row] = np.minimum(nothing[row], logits[none].astype(np.float64).sum())
                total[row] = np.logaddexp(total[row], all_spans)
                if not logit <= best[row]:
                    best[row], places[row] = logit, (window[BEGINS][span[0]], window[ENDS][span[1]])
            if spec["unanswerable"]:
                total = np.logaddexp(total, nothing)
                places[nothing > best] = -1
                best = np.maximum(best, nothing)
        cut = [context[start:end] if start >= 0 else "" for context, (start, end) in zip(contexts, places, strict=True)]
        score = np.exp(best - total).astype(np.float32)
        return written.records(cut, start=places[:, 0], end=places[:, 1], score=score)

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """The accepted answers of each row [n], a list of texts; none where it can't be answered."""
        import numpy as np

        found = np.empty(rows.num_rows, dtype=object)
        found[:] = rows["answers"].to_pylist()
        return found

    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"answer": a piece of the context, or "" for none, "score", "start", "end": its characters, or None}]."""
        return [
            {
                "answer": text,
                "score": float(one["score"]),
                **{name: int(one[name]) if one[name] >= 0 else None for name in ("start", "end")},
            }
            for text, one in zip(written.texts_of(outputs), outputs, strict=True)
        ]

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        return written.fidelity(outputs, reference, "score")

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        return written.flips(rows, outputs, reference, lambda some: self.answers(some, spec))


def likeliest_span(
    logits: NDArray[np.float32], begins: Sequence[int], longest: int
) -> tuple[float, tuple[int, int], float]:
    """Of one window, [length or more, 2]: the largest sum of a start's and an end's logit, its first and last token,
    and the log of the sum of exp over all spans of at most `longest` tokens of the context.

    Every span is looked at, so that nothing depends on how many candidates a search keeps.
    """
    import numpy as np

    length = len(begins)
    inside = np.asarray(begins) >= 0
    start, end = np.where(inside[:, None], logits[:length].astype(np.float64), -np.inf).T
    ends = np.lib.stride_tricks.sliding_window_view(np.append(end, np.full(longest - 1, -np.inf)), longest)
    sums = start[:, None] + ends  # [first token, tokens that follow it]
    first, further = divmod(int(sums.argmax()), longest)
    largest = float(sums[first, further])
    return largest, (first, first + further), largest + float(np.log(np.exp(sums - largest).sum()))


def _found(value: Any, context: str) -> tuple[list[str], int, int]:
    """The accepted answers, and the characters of the first of them that stands in the context; -1 for none."""
    places: list[Any] = []
    if isinstance(value, Mapping):
        value, places = value.get("text"), list(value.get("answer_start") or ())
    answers: list[Any] = [value] if isinstance(value, str) else list(value or ())
    if answers and all(isinstance(answer, Mapping) for answer in answers):  # as in SQuAD's own files
        places = [answer.get("answer_start") for answer in answers]
        answers = [answer.get("text") for answer in answers]
    if not all(isinstance(answer, str) for answer in answers):
        raise SourceError(f"an answer is no text: {listed(map(str, answers))}")
    given = {answer: place for answer, place in zip(answers, places, strict=False) if isinstance(place, int)}
    answers = [answer for answer in answers if answer.strip()]
    for answer in answers:
        start = given.get(answer, -1)
        if start < 0 or context[start : start + len(answer)] != answer:
            start = context.find(answer)
        if start >= 0:
            return answers, start, start + len(answer)
    return answers, -1, -1


def _cut(tokenizer: Any, questions: list[str], longest: int) -> list[str]:
    """Questions of at most so many tokens each, without white space around them, which some tokenizers trip over."""
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    return [
        question.strip() if len(tokens) <= longest else question[: tokens[longest - 1][1]].strip()
        for question, tokens in zip(questions, offsets, strict=True)
    ]


def _window(tokenizer: Any, encoded: Any, i: int) -> Features:
    ids = encoded["input_ids"][i]
    places = [
        place if part == 1 else (-1, -1)
        for place, part in zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)
    ]
    told = ("offset_mapping", "overflow_to_sample_mapping")
    return {
        **{name: encoded[name][i] for name in encoded if name not in told},
        ROW: [encoded["overflow_to_sample_mapping"][i]],
        BEGINS: [begin for begin, _ in places],
        ENDS: [end for _, end in places],
        NOTHING: [ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0],
    }


def _tokens_of(window: Features, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the characters from `start` to `end`, where the window holds all of them."""
    inside = [i for i, begin in enumerate(window[BEGINS]) if begin >= 0]
    if start < 0 or not inside or window[BEGINS][inside[0]] > start or window[ENDS][inside[-1]] < end:
        return None
    first = next(i for i in reversed(inside) if window[BEGINS][i] <= start)
    last = next(i for i in inside if window[ENDS][i] >= end)
    return first, max(first, last)
