"""What the exports of PyTorch's own programs share: the parent as a module that takes what its task gives it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize import runtimes
from optimize.errors import StageError
from optimize.export.parity import Check
from optimize.quiet import quiet
from optimize.runtimes.pytorch import named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimize.artifact import Artifact
    from optimize.context import Context


@dataclass(frozen=True)
class Parent:
    """An opened parent. Both samples are of real rows, and have two or more: tracers take one for a fixed size."""

    model: Any
    """As its runtime opened it."""
    module: nn.Module
    """Takes the tensors of a sample, by these names and in this order, and gives a dictionary of tensors."""
    sample: dict[str, Tensor]
    """Rows of all lengths, padded."""
    other: dict[str, Tensor]
    """The shortest row, twice: nothing of `sample` that a program has taken for fixed holds for it."""
    check: Check


def open_parent(artifact: Artifact, context: Context) -> Parent:
    """Open it, and copy all but its weights into `context.directory`.

    Raises `StageError` where the task writes text (its key/value cache has no place in such a program) or where there
    are no rows to check with.
    """
    if context.task.generates:
        raise StageError(
            f"a model for {context.task.name} needs its key/value cache, which such a program does not have",
            hint="use export: onnx",
        )
    preprocessor = context.task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
    with quiet():
        check = Check(artifact, context, preprocessor)
        runner: Any = runtimes.open_artifact(artifact, threads=1)
    by_name = artifact.format == "transformers"
    sample, other = (
        _tensors({name: array for name, array in arrays.items() if not by_name or name in runner.takes})
        for _, arrays in (check.batches[-1], check.batches[0])
    )
    weights = (".safetensors", ".safetensors.index.json")
    artifact.copy_files(context.directory, lambda name: not name.endswith(weights))
    return Parent(runner.model, answering(runner.model, tuple(sample), by_name), sample, other, check)


def answering(model: Any, names: tuple[str, ...], by_name: bool = True) -> nn.Module:
    """`model`, which takes its inputs by name or by position, as a module that takes these and no others."""
    from torch import nn

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor, **by_names: Tensor) -> dict[str, Tensor]:
            given = by_names or dict(zip(names, tensors, strict=True))
            return named(self.model(**given) if by_name else self.model(*(given[name] for name in names)))

    # Tracers name a program's inputs after the parameters.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    Answering.forward.__signature__ = signature  # type: ignore[attr-defined]
    return Answering().eval()


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor if len(tensor) > 1 else tensor.repeat_interleave(2, 0) for name, tensor in tensors.items()}
