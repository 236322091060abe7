"""Text that a language model writes on, a token at a time, through any runtime's `Decoder`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.runtimes import Decoder

UNFINISHED = "\ufffd"
"""What a tokenizer puts where the bytes of a character are not all there yet."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises `ValueError` for what can't be."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have at least this probability (arXiv:1904.09751)."""
    seed: int = 0
    stop: str | Sequence[str] = field(default=())
    """Texts at which to end; they are not part of the answer."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it is at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it is at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        if "" in self.stops:
            raise ValueError("an empty text to stop at would end every answer at once")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass
class Answer:
    """What was written so far."""

    text: str = ""
    tokens: int = 0
    """Tokens generated, with the one that ended it."""
    finish: str = "length"
    """`stop` where the model, or one of the texts to stop at, ended it; `length` where there was no more room."""


def write(
    decoder: Decoder, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, ends: frozenset[int], answer: Answer
) -> Iterator[str]:
    """Pieces of text as they come, each of whole characters; `answer` is kept up to date.

    `decoder` is empty and has room for `prompt` and the first new token at least; `ends` are tokens that end an answer.
    """
    import numpy as np

    generator = np.random.default_rng(sampling.seed)
    text = _Text(tokenizer, prompt)
    held = ""  # the beginning, perhaps, of a text to stop at
    ids = np.asarray(prompt, dtype=np.int64)
    for _ in range(sampling.max_new_tokens):
        token = choose(decoder.forward(ids), sampling, generator)
        answer.tokens += 1
        if token in ends:
            held += text.rest()
            answer.finish = "stop"
            break
        held += text.add(token)
        if cut := _first(held, sampling.stops):
            held, answer.finish = held[: cut[0]], "stop"
            break
        ready = len(held) - _overlap(held, sampling.stops)
        if ready:
            answer.text += held[:ready]
            yield held[:ready]
            held = held[ready:]
        ids = np.array([token], dtype=np.int64)
    else:
        held += text.rest()
    if held:
        answer.text += held
        yield held


def choose(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """A token, of logits [vocabulary]."""
    import numpy as np

    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    if sampling.top_p < 1:
        order = shares.argsort()[::-1]
        # The token that reaches top_p belongs to them.
        kept = order[: int(np.searchsorted(shares[order].cumsum(), sampling.top_p)) + 1]
        shares = np.where(np.isin(np.arange(len(shares)), kept), shares, 0.0)
        shares /= shares.sum()
    return int(generator.choice(len(shares), p=shares))


def end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: what the model's configs say, or else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if ends := [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]:
            return frozenset(ends)
    return frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})


class _Text:
    """Tokens into text. Some characters are several tokens, and some tokenizers write a token in another way behind
    others (a space, or none), so a few tokens are always decoded together with those before.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-4:])
        self.start = 0
        self.told = len(self.ids)

    def add(self, token: int) -> str:
        """The text that is certain now, perhaps none."""
        self.ids.append(token)
        before, now = self._decode(self.ids[self.start : self.told]), self._decode(self.ids[self.start :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self.start, self.told = self.told, len(self.ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end, with a sign for a character that was never finished."""
        before, now = self._decode(self.ids[self.start : self.told]), self._decode(self.ids[self.start :])
        self.start = self.told = len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _first(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(place, stop) of the first text to stop at."""
    found = [(place, stop) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How much of the text's end could be the beginning of a text to stop at."""
    longest = max(map(len, stops), default=0) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0
    )
