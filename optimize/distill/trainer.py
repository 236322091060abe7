"""The Trainer of transformers as every training here uses it: batches of similar length in an order that can resume,
checkpoints that are known to be whole, and a loss that has to be a number.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import sync_tree
from optimize.errors import StageError
from optimize.track.content import CURVES

if TYPE_CHECKING:
    from optimize.context import Context

_COMPLETE = "complete"
"""An empty file in a checkpoint's folder, written after all else: one without it was cut short by a kill."""
_POOL = 50
"""Batches that are sorted by length together: enough to pad little, few enough to stay a shuffle."""


def trainer_class() -> Any:
    """The Trainer with batches of similar length, in an order that only the seed and the epoch decide.

    Its own `group_by_length` draws from the global generator: a resume would give the second epoch another order.
    """
    import torch
    from transformers import Trainer

    class Sampler(torch.utils.data.Sampler[int]):
        def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
            self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            return iter(length_grouped(self.lengths, self.batch_size, f"{self.seed}/{self.epoch}"))

    class LengthGroupedTrainer(Trainer):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            parts = self.args.gradient_accumulation_steps * self.args.world_size
            # It takes a model that accepts `num_items_in_batch` for one that divides its loss by that. BERT's heads
            # do not: their loss would count once for each part of a batch.
            if parts > 1 and self.model_accepts_loss_kwargs:
                self.model_accepts_loss_kwargs = self._loss_is_a_share()

        def _loss_is_a_share(self) -> bool:
            rows: Any = self.train_dataset
            batch: Any = self._prepare_inputs(self.data_collator([rows[i] for i in range(min(2, len(rows)))]))
            model: Any = self.model
            was, items = model.training, torch.tensor(1000, device=self.args.device)
            model.eval()
            with torch.no_grad():
                plain, shared = (model(**batch, **more) for more in ({}, {"num_items_in_batch": items}))
            model.train(was)
            return bool(shared["loss"] < plain["loss"] / 2)

        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
            rows: Any = self.train_dataset if train_dataset is None else train_dataset
            # Several processes take turns: what they compute at a time is one batch, shared out.
            batch_size = self.args.train_batch_size * self.args.world_size
            return Sampler([len(row.get("input_ids", ())) for row in rows], batch_size, self.args.seed)

    return LengthGroupedTrainer


def length_grouped(lengths: Sequence[int], batch_size: int, seed: str) -> list[int]:
    """Row numbers in a shuffled order in which every `batch_size` neighbours are of similar length."""
    draw = random.Random(seed)
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    pool = _POOL * batch_size
    pools = [sorted(rows[i : i + pool], key=lengths.__getitem__, reverse=True) for i in range(0, len(rows), pool)]
    batches = [part[i : i + batch_size] for part in pools for i in range(0, len(part), batch_size)]
    # The one batch that is not full has to stay the last.
    full = [batch for batch in batches if len(batch) == batch_size]
    draw.shuffle(full)
    return [row for batch in full + [batch for batch in batches if len(batch) < batch_size] for row in batch]


def progress(context: Context) -> Any:
    """A callback that tells `context` of every step, looks at the loss, and marks checkpoints that are whole."""
    import torch
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        loss = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            context.update(state.global_step, state.max_steps, self.loss)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                check_loss(logs["loss"], f"at step {state.global_step}")
                self.loss = f"loss {logs['loss']:.3f}"
            if logs and state.is_world_process_zero:
                _note_curve(context.logs, state.global_step, logs)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.world_size > 1:
                torch.distributed.barrier()  # every process writes its own random state
            if not args.should_save:
                return
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync_tree(checkpoint)
            (checkpoint / _COMPLETE).touch()

    return Progress()


def _note_curve(folder: Path, step: int, logs: Mapping[str, float]) -> None:
    """A line of the training's curve, for trackers and reports. That it can't be written is no reason to stop."""
    numbers = {name: one for name, one in logs.items() if isinstance(one, int | float) and math.isfinite(one)}
    line = {**numbers, "step": step}
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / CURVES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def check_loss(loss: float, when: str) -> None:
    """Raises `StageError` where the loss is no number."""
    if not math.isfinite(loss):
        raise StageError(f"the loss is {loss} {when}", hint="lower learning_rate, or set precision: float32")


def last_checkpoint(scratch: Path) -> str | None:
    """The newest whole checkpoint in a folder."""
    complete = [path.parent for path in scratch.glob(f"checkpoint-*/{_COMPLETE}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
