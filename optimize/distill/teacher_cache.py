"""What a teacher says of rows, on the disk: computed once, so that further epochs cost only the student.

A file holds the rows of one batch, longest rows first, and appears by one rename when it is whole; what is there after
a kill is not computed again. Processes that train together share the work.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.tasks import Features

Kept = dict[str, "Tensor"]
"""What is kept of one row, by name, each [n, ...]."""
_OPEN = 256
"""Files that are held open."""


class Cache:
    """`compute` gives for some rows of a split, by their numbers, what is kept of each."""

    def __init__(self, folder: Path, compute: Callable[[str, list[int]], list[Kept]], batch_size: int) -> None:
        self.folder, self._compute, self._batch_size = folder, compute, batch_size
        self._places: dict[tuple[str, int], tuple[Path, int]] = {}
        self._reader = lru_cache(_OPEN)(_open)

    def fill(self, split: str, examples: Sequence[Features], on_batch: Callable[[int, int], None]) -> None:
        """Compute what is not there yet. Raises `StageError` where the disk has no room for it."""
        from safetensors.torch import save_file

        order = sorted(range(len(examples)), key=lambda row: (-_length(examples[row]), row))
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        folder = self.folder / split
        folder.mkdir(parents=True, exist_ok=True)
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        files = [folder / f"{number:06}.safetensors" for number in range(len(batches))]
        for number, (file, rows) in enumerate(zip(files, batches, strict=True)):
            self._places |= {(split, row): (file, position) for position, row in enumerate(rows)}
            if number % processes != rank or file.exists():
                continue
            tensors = {
                f"{position}/{name}": tensor.contiguous()
                for position, kept in enumerate(self._compute(split, rows))
                for name, tensor in kept.items()
            }
            temporary = atomic.sibling(file)
            save_file(tensors, temporary)
            atomic.sync(temporary)
            temporary.rename(file)
            if number == rank:
                self._check_room(file, len(batches))
            on_batch(number + 1, len(batches))
        while not all(file.exists() for file in files):  # those of other processes
            time.sleep(0.1)

    def rows(self, places: Sequence[tuple[str, int]]) -> Kept:
        """What is kept of rows, by split and number, joined in that order: each [n of all rows, ...]."""
        found = []
        for place in places:
            file, position = self._places[place]
            tensors, names = self._reader(file)
            prefix = f"{position}/"
            found.append({n.removeprefix(prefix): tensors.get_tensor(n) for n in names if n.startswith(prefix)})
        return {name: joined([row[name] for row in found]) for name in found[0]}

    def _check_room(self, file: Path, batches: int) -> None:
        """The first file holds the longest rows: all of them together are no larger than this."""
        free, needed = shutil.disk_usage(self.folder).free, file.stat().st_size * batches
        if needed > free:
            file.unlink()
            raise StageError(
                f"what the teacher says may take {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left",
                hint="keep the likeliest tokens alone (top_k: 64), or leave cache_teacher out",
            )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [n, ..., k] one behind the other; with different k, narrower ones are filled up with zeros."""
    import torch

    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])


def _open(file: Path) -> tuple[Any, list[str]]:
    from safetensors import safe_open

    tensors: Any = safe_open(file, framework="pt")
    return tensors, list(tensors.keys())


def _length(row: Features) -> int:
    return max(len(column) for column in row.values() if hasattr(column, "__len__"))
