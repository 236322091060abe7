"""What the runtimes of models with an encoder and a decoder share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.runtimes import Runner, Writer


@dataclass(frozen=True)
class ControlTokens:
    """Tokens that are no part of a text."""

    start: int
    """What the decoder reads first."""
    ends: frozenset[int]
    pad: int | None


def control_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ControlTokens:
    """From a `config.json` and a `generation_config.json`, which has the last word.

    Raises `EvaluationError` where neither says what a text begins with.
    """

    def said(name: str) -> Any:
        return next((found[name] for found in (generation, config) if found.get(name) is not None), None)

    start = said("decoder_start_token_id")
    start = said("bos_token_id") if start is None else start
    if not isinstance(start, int):
        raise EvaluationError(
            "neither config.json nor generation_config.json says which token the decoder starts with",
            hint="set decoder_start_token_id in config.json",
        )
    ends = said("eos_token_id")
    return ControlTokens(
        start, frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends]), said("pad_token_id")
    )


def control_tokens_of(directory: Path) -> ControlTokens:
    """As `control_tokens`, from the files of a model's folder."""
    config, generation = (
        json.loads(path.read_bytes()) if path.is_file() else {}
        for path in (directory / "config.json", directory / "generation_config.json")
    )
    return control_tokens(config, generation)


class SourceDecoder:
    """A text and what is written from it as one sequence, to be timed: what is read first is the source.

    The first `forward` runs the encoder over all its tokens, and the decoder up to the first token written; each
    further one appends a token to what was written.
    """

    def __init__(self, runner: Runner, max_length: int) -> None:
        import numpy as np

        self.length = 0
        self._runner = runner
        self._ids = np.empty(max_length, dtype=np.int64)
        self._source = 0
        self._writer: Writer | None = None

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        import numpy as np

        end = self.length + len(input_ids)
        if end > len(self._ids):
            raise EvaluationError(f"a sequence of {end} tokens does not fit in {len(self._ids)}")
        self._ids[self.length : end] = input_ids
        self.length = end
        if self._writer is None:
            self._source = end
            batch = {"input_ids": input_ids[None], "attention_mask": np.ones((1, end), dtype=np.int64)}
            self._writer = self._runner.writer(batch)
            input_ids = np.array([self._writer.tokens.start])
        for token in input_ids:
            logits = self._writer.forward(token[None])
        return logits[0]  # type: ignore[no-any-return]

    def truncate(self, length: int) -> None:
        if length >= self.length:
            return
        if self._writer is not None and length >= self._source:
            self._writer.truncate(1 + length - self._source)  # the token that it starts with stays
            self.length = length
            return
        # Another source is another encoding.
        self._writer, self.length = None, 0
        if length:
            self.forward(self._ids[:length].copy())
