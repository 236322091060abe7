"""Token classification: a label for each word, such as the names of people and places in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.entities import (
    ENTITY_F1,
    ENTITY_PRECISION,
    ENTITY_RECALL,
    OUTSIDE,
    TOKEN_ACCURACY,
    counts,
    entities,
)
from optimize.tasks import Features, Inputs, Metric, Task
from optimize.tasks.columns import label_lists, listed, refuse_rows, words
from optimize.tasks.heads import has_head
from optimize.tasks.padding import NO_LABEL, exact_length, pad
from optimize.tasks.pretrained import load_model, load_word_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

HEAD = "ForTokenClassification"
FIRST = "first"
"""What a row says besides the model's inputs: where the first piece of each word stands, -1 for a word without any."""
_WORD = re.compile(r"\w+|[^\w\s]")


class TokenClassificationData(DataConfig):
    """The `data` block of `task: token-classification`."""

    tokens: str = "tokens"
    """The column of the words: a list of texts, or one text, split at white space."""
    tags: str = "tags"
    """The column of their labels, as many as words: a list of names or whole numbers, or names in one text."""
    labels: list[str] | dict[str | int, str] | None = None
    """The labels' names in the order of the model's outputs; or value in the data -> name, in that order (several
    values may share a name). The default is what the data holds, sorted."""
    max_length: int = Field(128, ge=1)
    """Tokens a row, at most. The model does not see the rest, which counts as answered with nothing."""


class TokenClassification(Task):
    """`spec`: {"name", "max_length": tokens, "labels": names in the order of the model's outputs}.

    Rows have the columns `tokens` (words) and `label` (for each word the index of its label's name). A word's label is
    read off its first piece, and only that is trained on: the way of BERT (Devlin et al., 2019, section 5.3). Words
    differ in number, and entities are made of several, so outputs are records.
    """

    name: ClassVar[str] = "token-classification"
    Data: ClassVar[type[DataConfig]] = TokenClassificationData
    metrics: ClassVar[Mapping[str, Metric]] = {
        metric.name: metric for metric in (ENTITY_F1, ENTITY_PRECISION, ENTITY_RECALL, TOKEN_ACCURACY)
    }
    default_metrics: ClassVar[tuple[str, ...]] = ("entity_f1",)

    # Rows

    def prepare(self, table: pa.Table, config: TokenClassificationData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        for key in ("tokens", "tags"):
            if getattr(config, key) not in table.column_names:
                raise SourceError(
                    f"the data has no column {getattr(config, key)!r} for `data.{key}`",
                    hint=f"choose one of {', '.join(map(repr, table.column_names))}",
                )
        tokens = words(table[config.tokens], config.tokens)
        names, tags = label_lists(table, config.tags, config.labels)
        refuse_rows(
            "another number of labels than of words",
            config.tags,
            (len(ours) != len(theirs) for ours, theirs in zip(tags, tokens, strict=True)),
            hint="give every word one label",
        )
        columns = {"tokens": pa.array(tokens, pa.list_(pa.string())), "label": pa.array(tags, pa.list_(pa.int64()))}
        return pa.table(columns), {"labels": names}

    def spec(self, config: TokenClassificationData, info: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": self.name, "max_length": config.max_length, "labels": list(info["labels"])}

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Texts, which are split into words and punctuation marks, lists of words, or dictionaries with `tokens`."""
        import pyarrow as pa

        given = [value.get("tokens") if isinstance(value, Mapping) else value for value in inputs]
        rows: list[Any] = [_WORD.findall(value) if isinstance(value, str) else value for value in given]
        if not all(isinstance(row, Sequence) and row and all(isinstance(word, str) for word in row) for row in rows):
            raise OptimizeError(
                "inputs must be texts or lists of words", hint='give ["Ada lives in London."] or [["Ada", "lives"]]'
            )
        return pa.table({"tokens": pa.array(rows, pa.list_(pa.string()))})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        return has_head(path, HEAD, spec["labels"])

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        names, trained = spec["labels"], self.check_source(path, spec)
        return load_model(
            "AutoModelForTokenClassification",
            path,
            trained=trained,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=not trained,  # a classifier of whole texts calls its head the same
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        return load_word_tokenizer(path, trust_remote_code=trust_remote_code)

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """The model's inputs, and `first`."""
        encoded = preprocessor(
            rows["tokens"].to_pylist(),
            is_split_into_words=True,
            truncation=True,
            max_length=min(spec["max_length"], preprocessor.model_max_length),
        )
        return [
            {**{name: encoded[name][row] for name in encoded}, FIRST: first_pieces(encoded.word_ids(row))}
            for row in range(rows.num_rows)
        ]

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        inputs = [{name: values for name, values in row.items() if name != FIRST} for row in features]
        return pad(preprocessor, inputs, length, side="right", fill={"labels": NO_LABEL})

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        texts = [" ".join(row) for row in rows["tokens"].to_pylist()]
        return exact_length(preprocessor, [texts], batch_size=batch_size, sequence_length=sequence_length)

    # Training

    def examples(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        found = []
        for row, tags in zip(self.encode(preprocessor, rows, spec), rows["label"].to_pylist(), strict=True):
            labels = [NO_LABEL] * len(row["input_ids"])
            for position, tag in zip(row[FIRST], tags, strict=False):  # the words that are cut off have none
                if position >= 0:
                    labels[position] = tag
            found.append({**row, "labels": labels})
        return found

    def collate_examples(self, preprocessor: Any, examples: Sequence[Features]) -> Inputs:
        return self.collate(preprocessor, examples)

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[np.float32]:
        """Logits [batch, length, labels]; 0 where a row is padded."""
        import numpy as np

        if "logits" not in raw:
            raise EvaluationError(f"the model gives no `logits`, but {listed(raw)}")
        return np.where(inputs["attention_mask"][..., None] > 0, raw["logits"], 0).astype(np.float32)

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[Any]:
        """One record a row, [n]: of its words that the model saw the `logits` [W, labels] and the `tag` [W], the index
        of the likeliest label (-1: no such word); `entities`: how many are right, answered and wanted; `words`: how
        many are tagged right, and in all; `text`: the words, as JSON. Without known labels nothing is counted.
        """
        import numpy as np

        names, tokens = spec["labels"], rows["tokens"].to_pylist()
        wanted = rows["label"].to_pylist() if "label" in rows.column_names else [[] for _ in tokens]
        texts = np.array([json.dumps(row, ensure_ascii=False).encode() for row in tokens], dtype=np.bytes_)
        width = max(1, *(len(row[FIRST]) for row in features))
        found = np.zeros(len(tokens), dtype=record(width, len(names), texts.dtype))
        found["tag"] = -1
        found["text"] = texts
        for one, logits, row, known in zip(found, outputs, features, wanted, strict=True):
            first = np.array(row[FIRST], dtype=np.int64)
            seen = (first >= 0).nonzero()[0]
            one["logits"][seen] = logits[first[seen]]
            one["tag"][seen] = one["logits"][seen].argmax(axis=-1)
            if known:
                answered = np.full(len(known), -1)
                answered[: len(first)] = one["tag"][: len(first)]
                one["entities"] = counts(_named(answered, names), _named(known, names))
                one["words"] = (answered == known).sum(), len(known)
        return found

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """Nothing: a row's record says itself what was right."""
        import numpy as np

        return np.empty(0, dtype=np.int64)

    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"entities": [{"label", "text", "score", "start", "end"}], "tags": [name]}], a row each.

        `start` and `end` count words, as Python's slices do; the score is the mean of the words' probabilities. `tags`
        has one a word, as far as the model saw the row; None for a word in which the tokenizer finds nothing.
        """
        import numpy as np

        found = []
        for one in outputs:
            tags = one["tag"][: 1 + max((one["tag"] >= 0).nonzero()[0], default=-1)]
            logits = one["logits"][: len(tags)].astype(np.float64)
            powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
            scores = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
            names, tokens = _named(tags, spec["labels"]), json.loads(one["text"])
            found.append(
                {
                    "entities": [
                        {
                            "label": label,
                            "text": " ".join(tokens[start:end]),
                            "score": float(scores[start:end].mean()),
                            "start": start,
                            "end": end,
                        }
                        for label, start, end in entities(names)
                    ],
                    "tags": [name if tag >= 0 else None for name, tag in zip(names, tags, strict=True)],
                }
            )
        return found

    def incomparable(self, outputs: NDArray[Any], reference: NDArray[Any]) -> str | None:
        import numpy as np

        if outputs["logits"].shape == reference["logits"].shape and np.array_equal(
            outputs["tag"] >= 0, reference["tag"] >= 0
        ):
            return None
        return "it sees other words of the rows, or has other labels"

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        """Of the words that were seen, which `n` counts."""
        seen = reference["tag"] >= 0
        return super().fidelity(outputs["logits"][seen], reference["logits"][seen])

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        flipped = (outputs["tag"] != reference["tag"]).any(axis=1).nonzero()[0]
        if not len(flipped):
            return []
        before, after = (self.answers(answers[flipped], spec) for answers in (reference, outputs))
        return [
            {
                "row": row,
                "tokens": columns["tokens"],
                "tags": _named(columns["label"], spec["labels"]),
                "baseline": then["tags"],
                "candidate": now["tags"],
            }
            for row, columns, then, now in zip(
                flipped.tolist(), rows.take(flipped).to_pylist(), before, after, strict=True
            )
        ]


def record(words: int, labels: int, text: np.dtype[Any]) -> np.dtype[Any]:
    """What `TokenClassification.combine` says of a row of so many words at most."""
    import numpy as np

    return np.dtype(
        [
            ("logits", np.float32, (words, labels)),
            ("tag", np.int32, (words,)),
            ("entities", np.int64, (3,)),
            ("words", np.int64, (2,)),
            ("text", text),
        ]
    )


def first_pieces(word_ids: Sequence[int | None]) -> list[int]:
    """For each word the position of its first piece, -1 for one without any, up to the last word that has one.

    `word_ids`: for each piece the number of its word, None for a special token.
    """
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    return [first.get(word, -1) for word in range(1 + max(first, default=-1))]


def _named(tags: Sequence[int] | NDArray[Any], names: Sequence[str]) -> list[str]:
    """What the model did not see is outside of every entity."""
    return [names[tag] if tag >= 0 else OUTSIDE for tag in tags]
