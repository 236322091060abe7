"""Distillation of a teacher's answers (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

The student learns the teacher's probabilities, softened by a temperature, beside the labels:

    loss = alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross-entropy

    stages:
      - distill: finetune
        name: teacher
      - distill: student
        num_hidden_layers: 3
      - distill: logits
        teacher: teacher
        temperature: 4
        alpha: 0.7
        epochs: 3

For labels of whole texts or images, of tokens, of spans, and for next, masked and written tokens; padding and ignored
labels count nothing. The teacher may be of another width, depth or family, as long as it has the same labels and, where
outputs are of tokens, the same tokenizer. A label of a whole text can be learnt from a teacher with another tokenizer:
it reads the rows by its own.

With `cache_teacher` the teacher answers every row once, before training. Results then differ from those without by
rounding, since a row's last bits depend on what it is batched with (test: weights within 1e-4 of each other).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.distill import launch
from optimize.distill.training import LargeTraining

VERSION = 1


class Config(LargeTraining):
    """`distill: logits`."""

    teacher: str
    """The stage whose model is learnt from, or `source`."""
    temperature: float = Field(2.0, gt=0)
    """By which both models' logits are divided: above 1, unlikely answers count for more."""
    alpha: float = Field(0.5, ge=0, le=1)
    """The weight of the teacher's answers; the labels have the rest."""
    top_k: int | None = Field(None, ge=1)
    """Of the teacher's probabilities keep the k largest, and the sum of all others; None keeps all. For vocabularies,
    whose answers fill the disk or the memory."""
    cache_teacher: bool = False
    """Ask the teacher once, before training, and keep what it says on the disk until the stage is done."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Raises `StageError` as `distill: finetune` does, and where the teacher has other labels, or another tokenizer
    that matters.
    """
    if config.processes > 1:
        return launch.run(__name__, artifact, config, context)
    from optimize.distill.answers import Answers
    from optimize.distill.distilling import teach

    def signals(student: Any, teacher: Any) -> dict[str, Answers]:
        return {"answers": Answers(context.task, config.alpha, config.temperature, config.top_k)}

    return teach(artifact, config, context, signals)
