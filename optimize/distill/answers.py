"""What a student learns from a teacher's outputs: the softened answers of `distill: logits`.

A *signal* is what is taken from a model's outputs for a batch, as tensors [n, ...] in the order of the batch: n rows,
supervised places or tokens. So a teacher's can be computed once, cut apart by rows, kept on the disk, and joined again
for other batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimize.distill import losses
from optimize.errors import StageError
from optimize.tasks.padding import NO_LABEL

if TYPE_CHECKING:
    from optimize.tasks import Task

Batch = Mapping[str, Any]
SPAN = ("start_positions", "end_positions")


class Signal(ABC, nn.Module):
    """One thing that a student learns. What it has to learn itself for that, such as a projection, is trained with the
    student and thrown away.
    """

    asks: Mapping[str, bool] = {}
    """What models are to give besides their usual outputs, such as `output_hidden_states`."""
    of_tokens = True
    """Whether both models have to read the same tokens."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def of_teacher(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        """What is kept of the teacher's outputs, by name, each [n, ...]."""

    @abstractmethod
    def counts(self, batch: Batch) -> list[int] | None:
        """How many of the n are each row's; None where all rows have as many."""

    @abstractmethod
    def loss(self, wanted: Mapping[str, Tensor], outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        """How far the student's outputs are from that."""


class Answers(Signal):
    """The answers themselves: labels of rows, of tokens, of the places where a span begins and ends, or next tokens."""

    of_tokens = False

    def __init__(self, task: Task, weight: float, temperature: float, top_k: int | None) -> None:
        super().__init__(weight)
        self.temperature, self.top_k = temperature, top_k
        # A language model's logits stand a place before the token that they foretell.
        self.shifted = task.generates and not task.encodes

    def of_teacher(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        logits = self._flat(outputs, batch)
        if self.top_k is None or SPAN[0] in batch or self.top_k >= logits.shape[-1]:
            return {"logits": logits.float()}
        values, indices = losses.most_likely(logits, self.top_k, self.temperature)
        return {"log_probabilities": values, "indices": indices.to(torch.int32)}

    def counts(self, batch: Batch) -> list[int] | None:
        places = seen(batch) if SPAN[0] in batch else self._places(batch)
        return None if places is None else counts_of(places)

    def loss(self, wanted: Mapping[str, Tensor], outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        found = self._flat(outputs, batch)
        if "indices" in wanted:
            kept, indices = wanted["log_probabilities"], wanted["indices"].long()
            return losses.softened_top(kept, indices, found, self.temperature)
        teacher = wanted["logits"]
        if teacher.shape[-1] != found.shape[-1]:
            raise StageError(
                f"the teacher chooses between {teacher.shape[-1]} answers, the student between {found.shape[-1]}",
                hint="both need the same labels, or the same vocabulary",
            )
        if SPAN[0] in batch:
            # A choice between the tokens of a row: [2 * batch, length].
            teacher, found = (_spread(part, seen(batch)).transpose(1, 2).flatten(0, 1) for part in (teacher, found))
        return losses.softened(teacher, found, self.temperature)

    def _flat(self, outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        """Logits [n, labels]; of spans those of each token to begin and to end it, [n, 2]."""
        if SPAN[0] in batch:
            return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)[seen(batch)]
        logits: Tensor = outputs["logits"]
        places = self._places(batch)
        return logits if places is None else logits[places]

    def _places(self, batch: Batch) -> Tensor | None:
        """Where labels count [batch, length]; None where rows have one each."""
        labels: Tensor = batch["labels"]
        if labels.dim() == 1:
            return None
        places = labels != NO_LABEL
        if self.shifted:
            places = nn.functional.pad(places[:, 1:], (0, 1), value=False)
        return places


def seen(batch: Batch) -> Tensor:
    """Which tokens are no padding, [batch, length]."""
    return batch["attention_mask"] > 0  # type: ignore[no-any-return]


def counts_of(places: Tensor) -> list[int]:
    """How many places of each row [batch, length] are true."""
    return places.sum(dim=1).tolist()


def _spread(flat: Tensor, places: Tensor) -> Tensor:
    """[n, k] put back where it came from: [batch, length, k], elsewhere -inf."""
    spread = torch.full((*places.shape, flat.shape[-1]), -torch.inf, dtype=torch.float32, device=flat.device)
    spread[places] = flat.float()
    return spread
