"""What the back ends of quantisation-aware training share: a model that was trained, on its way to what ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact
from optimize.errors import StageError
from optimize.runtimes.transformers import TorchRunner

if TYPE_CHECKING:
    from pathlib import Path

    from optimize.context import Context
    from optimize.export.parity import Check
    from optimize.runtimes import Runner


def saved(model: Any, artifact: Artifact, folder: Path) -> Artifact:
    """The model in float as a checkpoint in `folder`, with the other files of the artifact that it comes from."""
    model.save_pretrained(folder)
    weights = (".safetensors", ".safetensors.index.json")
    artifact.copy_files(folder, lambda name: not name.endswith(weights) and not (folder / name).exists())
    return Artifact.from_directory(
        folder, format="transformers", task=artifact.task, trust_remote_code=artifact.trust_remote_code
    )


def answers(model: Any, check: Check, context: Context) -> list[Any]:
    """What a model says to the checked rows, while it still computes on rounded numbers."""
    return _asked(TorchRunner(model, threads=1), check, context)


def difference(runner: Runner, expected: list[Any], tolerance: float, check: Check, context: Context) -> float:
    """The largest of any output of what ships from what the trained model said, to one digit.

    Raises `StageError` where it is larger than `tolerance`.
    """
    pairs = zip(_asked(runner, check, context), expected, strict=True)
    largest = max(float(context.task.differences(got, wanted).max()) for got, wanted in pairs)
    if not largest <= tolerance:
        raise StageError(
            f"what ships answers differently from the model that was trained: by {largest:.2g} (tolerance "
            f"{tolerance:g})",
            hint="on a processor without VNNI, 8-bit sums can overflow: set reduce_range: true",
        )
    return float(f"{largest:.0e}")


def _asked(runner: Runner, check: Check, context: Context) -> list[Any]:
    return [context.task.read_outputs(runner.run(inputs), inputs) for _, inputs in check.batches]
