"""Calibration: some rows of the `calibration` split as model inputs. The same block wherever a stage needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optimize.config import Block
from optimize.errors import StageError

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.context import Context
    from optimize.tasks import Inputs


class Calibration(Block):
    """Which rows a stage looks at while it quantises."""

    num_samples: int = Field(128, ge=1)
    """Rows; of a language model windows of `max_length` tokens."""
    max_length: int = Field(512, ge=1)
    """Tokens a row, at most; of a language model exactly."""
    batch_size: int = Field(8, ge=1)
    """Rows a forward pass."""
    seed: int = 0
    """Of the draw."""


def calibration_batches(artifact: Artifact, calibration: Calibration, context: Context) -> list[Inputs]:
    """The drawn rows, collated in the order drawn; each array is [batch_size, length], the last batch may be smaller.

    Raises `StageError` where there are too few, where a row is longer than the model allows, or where a token lies
    outside its vocabulary.
    """
    task, spec = context.task, artifact.task
    preprocessor = task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
    features = task.calibration(preprocessor, context.data.rows("calibration"), artifact.path, spec, calibration)
    if len(features) < calibration.num_samples:
        raise StageError(
            f"calibration wants {calibration.num_samples} samples of at most {calibration.max_length} tokens, "
            f"and the calibration split is enough for {len(features)}",
            hint="give the split more rows, or lower calibration.num_samples",
        )
    return [
        task.collate(preprocessor, features[start : start + calibration.batch_size])
        for start in range(0, len(features), calibration.batch_size)
    ]


def as_inputs(batches: Iterable[Mapping[str, Any]]) -> list[Inputs]:
    """Model inputs from Python as arrays: of what a tokenizer gives, tensors are taken, too."""
    import numpy as np

    return [
        {
            name: value.numpy(force=True) if hasattr(value, "numpy") else np.asarray(value)
            for name, value in batch.items()
        }
        for batch in batches
    ]
