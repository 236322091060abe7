"""What the tests of distillation share besides fixtures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from optimize.context import Context
from optimize.progress import Progress

QUICK: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 16, "device": "cpu", "threads": 1}
GOOD, BAD, PLAIN = (
    ["good", "fine", "superb"],
    ["bad", "dull", "awful"],
    ["the", "a", "film", "story", "plot", "with", "is"],
)
"""Words that the pico tokenizer knows."""
SPLITS = {"train": 0.6, "validation": 0.2, "evaluation": 0.2}


class Killed(BaseException):
    """Stands for a signal: nothing in the training catches it."""


class KilledAt(Progress):
    """Kills when so many steps of one kind are done."""

    def __init__(self, step: int, text: str = "loss") -> None:
        self.step, self.text = step, text

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        if done == self.step and (text.startswith(self.text) or (not text and self.text == "loss")):
            raise Killed


@dataclasses.dataclass
class Room:
    """A task with rows of its own."""

    spec: dict[str, Any]
    make: Callable[..., Context]
    """Every call gives a context in new folders."""
