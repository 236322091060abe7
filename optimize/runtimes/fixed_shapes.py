"""Graphs that take one size of batch or one length: smaller inputs are padded, larger batches are split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]


def answer(
    inputs: Arrays,
    batch: int | None,
    length: int | None,
    run: Callable[[Arrays], dict[str, NDArray[Any]]],
    long: Collection[str],
) -> dict[str, NDArray[Any]]:
    """What `run` gives for inputs of any size, where it takes arrays of exactly [batch, length] (None: free).

    Rows are padded on the right with zeros, which their attention mask so leaves out, and batches with the last row.
    `long` are the outputs whose axis 1 is the length. Raises `EvaluationError` where a row is longer than `length`.
    """
    import numpy as np

    rows, tokens = next(array.shape for array in inputs.values() if array.ndim > 1)[:2]
    if length is not None:
        if tokens > length:
            raise EvaluationError(
                f"the model takes rows of {length} tokens, and one has {tokens}",
                hint="its size was fixed by export: onnx with sequence_length",
            )
        inputs = {
            name: np.pad(array, ((0, 0), (0, length - tokens))) if array.ndim == 2 else array
            for name, array in inputs.items()
        }
    size = batch or rows
    parts = []
    for start in range(0, rows, size):
        part = {name: array[start : start + size] for name, array in inputs.items()}
        missing = size - min(size, rows - start)
        parts.append(
            run({name: np.concatenate([array, array[-1:].repeat(missing, 0)]) for name, array in part.items()})
        )
    whole = {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}
    return {name: array[:, :tokens] if name in long else array for name, array in whole.items()}
