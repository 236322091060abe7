"""How far a model's answers move when some of its weights are others: on the same rows, from block to block.

Blocks before the first changed one give what they gave before, so that a pass begins there: their output is kept for
every batch, and handed on in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.prune.forward import LABELS, answers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from optimize.tasks import Task

Batch = Mapping[str, "Tensor"]

KEPT_BYTES = 512 * 2**20
"""Of the dense model's answers: of a large vocabulary only some positions of each row are compared, always the same."""
_HIDDEN = -1e4
"""A logit that no answer can have."""


class _Ended(Exception):
    """Ends a forward pass behind a block."""


@dataclass(frozen=True)
class Moved:
    """Where answers are now, beside the dense model's."""

    distances: NDArray[np.float64]
    """One a row [n]: the KL divergence from the dense model in nats, the mean over its positions; of embeddings 1 less
    the cosine."""
    flip_rate: float | None
    """The share of positions with another likeliest answer; None for embeddings."""
    loss: float | None
    """The model's own loss on the labels; None where there are none."""


class Blockwise:
    """Forward passes of batches of rows through a model that begin at a block, once `advance` has reached it."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.start = 0
        """The first block that runs."""
        self._given: list[Any] = [None] * len(batches)
        """Of every batch, what the block before `start` gives."""

    def run(self, batch: int) -> dict[str, Tensor]:
        """The model's outputs. Raises what the model raises."""
        import torch

        given = self._given[batch]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for block in self.blocks[: self.start]:
                stack.enter_context(_answering(block, given))
            return answers(self.model, self.batches[batch])

    def advance(self, see: Mapping[str, nn.Module], look: Callable[[str, int, Tensor], None]) -> None:
        """Go through one more block, with the weights it has now; `look` is told a batch's input of each layer of `see`
        as (name, batch, input). Behind the last block, run to the end.
        """
        last = self.start == len(self.blocks)
        for number in range(len(self.batches)):
            caught: list[Any] = []

            def keep(module: Any, args: Any, output: Any, caught: list[Any] = caught) -> None:
                caught.append(output)
                raise _Ended

            hooks = [
                layer.register_forward_pre_hook(lambda _, args, name=name, number=number: look(name, number, args[0]))
                for name, layer in see.items()
            ]
            if not last:
                hooks.append(self.blocks[self.start].register_forward_hook(keep))
            try:
                with contextlib.suppress(_Ended):
                    self.run(number)
            finally:
                for hook in hooks:
                    hook.remove()
            if not last:
                self._given[number] = caught[0]
        self.start += not last

    def rewind(self) -> None:
        """Begin at the first block again."""
        self.start, self._given = 0, [None] * len(self.batches)


@contextlib.contextmanager
def _answering(block: nn.Module, given: Any) -> Iterator[None]:
    block.forward = lambda *_, **__: given
    try:
        yield
    finally:
        del block.forward


class Judge:
    """What the dense model answers to the rows, and how far other answers lie from that."""

    def __init__(self, passes: Blockwise, task: Task) -> None:
        self.passes, self.task = passes, task
        rows = sum(_rows(batch) for batch in passes.batches)
        self.positions: int | None = None
        """Positions of each row that are compared; None where a row has one answer, or all are."""
        first = passes.run(0)
        self.distance = "kl" if any(name.endswith("logits") for name in first) else "cosine_distance"
        logits = first.get("logits")
        if logits is not None and logits.dim() == 3:
            fitting = max(1, KEPT_BYTES // (4 * rows * logits.shape[-1]))
            if fitting < logits.shape[1]:
                self.positions = fitting
        self._expected: list[Any] = []
        losses = []
        for number in range(len(passes.batches)):
            outputs = passes.run(number)
            self._expected.append(self._answers(number, outputs))
            losses.append(outputs.get("loss"))
        self.loss = self._mean_loss(losses)

    @property
    def rows(self) -> int:
        return sum(_rows(batch) for batch in self.passes.batches)

    def moved(self) -> Moved:
        """Of the model as it is now."""
        import numpy as np

        distances, flips, compared, losses = [], 0, 0, []
        for number, expected in enumerate(self._expected):
            outputs = self.passes.run(number)
            losses.append(outputs.get("loss"))
            ours, row_of = self._answers(number, outputs)
            theirs = expected[0]
            if self.distance == "kl":
                apart = sum((t.exp() * (t - o)).sum(-1).clamp(min=0) for o, t in zip(ours, theirs, strict=True))
                flips += sum(int((o.argmax(-1) != t.argmax(-1)).sum()) for o, t in zip(ours, theirs, strict=True))
                compared += sum(len(t) for t in theirs)
            else:
                apart = 1 - (ours[0] * theirs[0]).sum(-1)
            distances.append(_row_means(apart, row_of, _rows(self.passes.batches[number])))
        return Moved(np.concatenate(distances), flips / compared if compared else None, self._mean_loss(losses))

    def _answers(self, number: int, outputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """(log-probabilities [n, choices], one tensor or, of spans, two; the row of each of the n [n])."""
        import torch
        from torch.nn.functional import log_softmax, normalize

        batch = self.passes.batches[number]
        count = _rows(batch)
        each = torch.arange(count)
        if self.distance != "kl":
            inputs = {name: value.cpu().numpy() for name, value in batch.items() if name != LABELS}
            raw = {name: value.float().cpu().numpy() for name, value in outputs.items()}
            found = torch.as_tensor(self.task.read_outputs(raw, inputs)).reshape(count, -1)
            return [normalize(found.double(), dim=-1)], each
        mask = batch.get("attention_mask")
        if "logits" not in outputs:  # spans: a position each for start and end
            hidden = torch.zeros(1, dtype=torch.bool) if mask is None else mask == 0
            spans = [outputs[name] for name in sorted(outputs) if name.endswith("logits")]
            return [log_softmax(one.float().masked_fill(hidden, _HIDDEN), -1) for one in spans], each
        logits = outputs["logits"]
        if logits.dim() == 2:
            return [log_softmax(logits.float(), -1)], each
        seen = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else (mask != 0).cpu()
        if self.positions is not None:
            seen = _some(seen, self.positions, seed=number)
        return [log_softmax(logits[seen.to(logits.device)].float(), -1)], seen.nonzero()[:, 0]

    def _mean_loss(self, losses: Sequence[Any]) -> float | None:
        if any(loss is None for loss in losses):
            return None
        sizes = [_rows(batch) for batch in self.passes.batches]
        return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def _some(seen: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the positions of each row that are `seen` [rows, length], drawn."""
    import torch

    draw = torch.rand(seen.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~seen, 2)
    ranks = draw.argsort(dim=1).argsort(dim=1)
    return seen & (ranks < count)


def _row_means(values: Any, row_of: Tensor, rows: int) -> NDArray[np.float64]:
    import torch

    values = values.detach().cpu().double()
    sums = torch.zeros(rows, dtype=torch.float64).index_add_(0, row_of, values)
    return (sums / torch.bincount(row_of, minlength=rows).clamp(min=1)).numpy()


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


@contextlib.contextmanager
def replaced(weights: Mapping[str, tuple[Tensor, torch.Tensor]]) -> Iterator[None]:
    """Inside, these weights are others: name -> (the parameter's own memory as [out, in], what it holds meanwhile)."""
    before = {name: own.clone() for name, (own, _) in weights.items()}
    for own, other in weights.values():
        own.copy_(other)
    try:
        yield
    finally:
        for name, (own, _) in weights.items():
            own.copy_(before[name])
