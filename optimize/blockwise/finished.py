"""Finished blocks on the disk: a killed run goes on behind the last of them.

Step 0 is the embedding, step n the n-th block. A step's folder appears by one rename when it is complete, and holds the
tensors that were made, the facts about them, and what the block puts out: the next one's input. Outputs of earlier
steps are removed, so that one set of them, or two for a moment, is on the disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.artifact import sync_tree
from optimize.blockwise.lazy_weights import Stored, stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import Tensor

_TENSORS = "tensors.safetensors"
_FACTS = "facts.json"
_OUTPUTS = "outputs"


class Finished:
    """The steps in `folder`; `in_memory` keeps the last one's outputs there as well."""

    def __init__(self, folder: Path, *, in_memory: bool, device: torch.device) -> None:
        self._folder, self.in_memory, self._device = folder, in_memory, device
        self._hidden: list[Tensor] = []
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(".*.tmp"):
            atomic.remove(rest)
        self.count = len(list(folder.iterdir()))
        """Steps that are done."""

    def hidden(self, batch: int) -> Tensor:
        """What the last step put out for a batch."""
        if self._hidden:
            return self._hidden[batch]
        outputs = self._step(self.count - 1) / _OUTPUTS
        return stored(outputs / f"{batch:05}.safetensors")["hidden"].load().to(self._device)

    def add(self, outputs: Iterable[Tensor], tensors: Mapping[str, Tensor], facts: Any) -> None:
        """One more step; `outputs` [batch, length, width] are written as they come."""
        from safetensors.torch import save_file

        step = self._step(self.count)
        temporary = atomic.sibling(step)
        (temporary / _OUTPUTS).mkdir(parents=True)
        hidden = []
        for batch, output in enumerate(outputs):
            save_file({"hidden": output.contiguous()}, temporary / _OUTPUTS / f"{batch:05}.safetensors")
            if self.in_memory:
                hidden.append(output)
        save_file(dict(tensors), temporary / _TENSORS)
        (temporary / _FACTS).write_bytes(atomic.json_bytes(facts))
        sync_tree(temporary)
        temporary.rename(step)
        atomic.sync(self._folder)
        self._hidden = hidden
        self.count += 1
        if self.count > 1:
            atomic.remove(self._step(self.count - 2) / _OUTPUTS)

    def facts(self) -> list[Any]:
        """What every step found out, in their order."""
        return [json.loads((self._step(step) / _FACTS).read_bytes()) for step in range(self.count)]

    def tensors(self) -> dict[str, Stored]:
        """What all steps made."""
        return {
            name: tensor for step in range(self.count) for name, tensor in stored(self._step(step) / _TENSORS).items()
        }

    def _step(self, number: int) -> Path:
        return self._folder / f"{number:05}"
