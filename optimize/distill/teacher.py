"""A teacher: a trained model that answers the rows which its student learns from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.runtimes import pytorch

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.artifact import Artifact
    from optimize.context import Context
    from optimize.tasks import Features, Task

_COMPARED = 64
"""Rows on which two preprocessors have to agree."""


class Teacher:
    """Loaded from an artifact with the same labels. Raises `StageError` where it has others, or no trained head."""

    def __init__(self, name: str, artifact: Artifact, spec: Mapping[str, Any], task: Task) -> None:
        ours, theirs = spec.get("labels"), artifact.task.get("labels")
        if ours != theirs:
            raise StageError(f"the teacher {name} has the labels {theirs}, and the student {ours}")
        if artifact.format == "transformers" and not task.check_source(artifact.path, spec):
            raise StageError(
                f"the teacher {name} has no trained head for {task.name}",
                hint="train it first: `distill: finetune`, and name that stage as the teacher",
            )
        self.task = task
        self.name = name
        trust = artifact.trust_remote_code
        self.preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
        self.model = task.load_model(artifact.path, spec, trust_remote_code=trust).requires_grad_(False).eval()
        self.config: Any = getattr(self.model, "config", None)
        self._takes: set[str] | None = None
        if artifact.format == "transformers":
            self._takes = set(inspect.signature(self.model.forward).parameters)
        if self._takes and not getattr(self.config, "is_encoder_decoder", False):
            self._takes -= {"labels", "start_positions", "end_positions"}  # its own loss is of no use

    def __call__(self, inputs: Mapping[str, Tensor], **more: Any) -> Mapping[str, Any]:
        """What it answers to a batch, without gradients, on the device of the batch."""
        import torch

        device = next(iter(inputs.values())).device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        with torch.no_grad():
            if self._takes is None:
                return pytorch.named(self.model(inputs["pixel_values"]))
            return self.model(**{k: v for k, v in inputs.items() if k in self._takes}, **more)  # type: ignore[no-any-return]


def same_inputs(task: Task, ours: Any, theirs: Any, spec: Mapping[str, Any], context: Context) -> bool:
    """Whether two preprocessors make the same of rows, as far as the first of the training rows tell."""
    import numpy as np

    rows = context.data.rows("train").slice(0, _COMPARED)
    if _vocabulary(ours) != _vocabulary(theirs):
        return False
    one, other = (task.encode(preprocessor, rows, spec) for preprocessor in (ours, theirs))
    if len(one) != len(other):
        return False
    for mine, its in zip(one, other, strict=True):
        known = task.collate(ours, [mine])
        wanted = task.collate(theirs, [its])
        if any(name not in known or not np.array_equal(known[name], array) for name, array in wanted.items()):
            return False
    return True


def own_inputs(teacher: Teacher, preprocessor: Any, spec: Mapping[str, Any], context: Context) -> bool:
    """Whether the teacher has to read rows by a preprocessor of its own.

    Raises `StageError` where outputs are of tokens, and the two cut rows into different ones.
    """
    task = teacher.task
    if same_inputs(task, preprocessor, teacher.preprocessor, spec, context):
        return False
    if task.per_row:
        return True
    raise StageError(
        f"the tokenizer of the teacher {teacher.name} is not the student's, and models for {task.name} answer for "
        "every token",
        hint="take a student with the teacher's tokenizer, such as one of `distill: student`",
    )


def encoded(teacher: Teacher, split: str, spec: Mapping[str, Any], context: Context) -> Sequence[Features]:
    """A split's rows as the teacher reads them by its own preprocessor."""
    return teacher.task.encode(teacher.preprocessor, context.data.rows(split), spec)


def _vocabulary(preprocessor: Any) -> Any:
    return preprocessor.get_vocab() if hasattr(preprocessor, "get_vocab") else None
