"""Texts as token ids, and those of several rows as one array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from optimize.errors import EvaluationError
from optimize.tasks import Features, Inputs

NO_LABEL = -100
"""Stands where a loss counts nothing (PyTorch's default)."""


def tokenize(tokenizer: Any, *texts: list[str], max_length: int) -> list[Features]:
    """Rows of one text, or of two together, cut to `max_length` tokens and to what the model can take."""
    longest = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(*texts, truncation=True, max_length=longest, padding=False)
    return [{name: encoded[name][row] for name in encoded} for row in range(len(texts[0]))]


def pad(
    tokenizer: Any,
    features: Sequence[Features],
    length: int | None = None,
    side: Literal["left", "right"] | None = None,
    fill: Mapping[str, int] | None = None,
) -> Inputs:
    """[batch, length]: to the longest row, or to exactly `length` (longer rows are cut); by default on the tokenizer's
    own side. `fill` says what other inputs than the tokenizer's are padded with; else it is 0.
    """
    import numpy as np

    padding = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        **(fill or {}),
    }
    left = (side or tokenizer.padding_side) == "left"
    width = length or max(len(row["input_ids"]) for row in features)
    batch: Inputs = {}
    for name in features[0]:
        array = np.full((len(features), width), padding.get(name, 0), dtype=np.int64)
        for i, row in enumerate(features):
            values = row[name][:width]
            start = width - len(values) if left else 0
            array[i, start : start + len(values)] = values
        batch[name] = array
    return batch


def exact_length(tokenizer: Any, columns: Sequence[Sequence[str]], *, batch_size: int, sequence_length: int) -> Inputs:
    """Rows of one or two columns of text, each repeated and cut to exactly so many tokens, for `Task.latency_inputs`.

    Raises `EvaluationError` for more tokens than the model can take, and for text without any.
    """
    if sequence_length > tokenizer.model_max_length:
        raise EvaluationError(
            f"sequence_length {sequence_length} is longer than the model's {tokenizer.model_max_length} tokens",
            hint=f"set evaluate.latency.sequence_length to at most {tokenizer.model_max_length}",
        )
    repeated = [
        [" ".join([texts[row % len(texts)]] * sequence_length) for row in range(batch_size)] for texts in columns
    ]
    features = tokenize(tokenizer, *repeated, max_length=sequence_length)
    if any(len(row["input_ids"]) != sequence_length for row in features):
        raise EvaluationError("a row has text in which the tokenizer finds nothing", hint="filter such rows out")
    return pad(tokenizer, features)
