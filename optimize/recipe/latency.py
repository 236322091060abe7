"""The block `evaluate.latency`: what is timed, and how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from optimize.config import Block

if TYPE_CHECKING:
    from optimize.tasks import Task


class Decode(Block):
    """One token after another, through the key/value cache."""

    prompt_length: int = Field(default=128, ge=1)
    """Tokens in the cache before the first."""
    new_tokens: int = Field(default=64, ge=1)
    """Tokens that follow, as far as time allows; after the last, it goes on from the prompt's end again."""


class Latency(Block):
    """How the time of a model call is measured: rounds of fresh processes that take turns."""

    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 8)
    """Rows a call. Not for a language model."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens a row; every row has exactly so many. Not for a language model, nor for images."""
    prefill: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (128,)
    """Of a language model: tokens of the prompts whose time to first token is measured."""
    decode: Decode | None = Decode()
    """Of a language model: where the time of each further token is measured; null leaves it out."""
    threads: int = Field(default=1, ge=1)
    """Threads of the runtime."""
    rounds: int = Field(default=6, ge=6)
    """The fewest rounds."""
    half_width: float = Field(default=0.03, gt=0)
    """Rounds go on until half the 90 % interval of the log ratio is this narrow, or the budget is spent."""
    budget_seconds: float = Field(default=90.0, gt=0)
    """The most time that all rounds may take."""

    @staticmethod
    def settings_of(task: Task) -> tuple[str, ...]:
        """The keys that say what is called."""
        if task.generates:
            return "prefill", "decode"
        return ("batch_sizes", "sequence_length") if task.has_length else ("batch_sizes",)

    @classmethod
    def senseless(cls, task: Task) -> set[str]:
        """The keys that say nothing of such a task."""
        return {"prefill", "decode", "batch_sizes", "sequence_length"} - {*cls.settings_of(task)}

    def of(self, task: Task) -> dict[str, Any]:
        """As JSON, less the keys that say nothing of it."""
        return self.model_dump(mode="json", exclude=self.senseless(task))
