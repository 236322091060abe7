"""Answers that are texts: records with the field `text` (UTF-8), and whatever numbers stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


def records(texts: Sequence[str], **numbers: NDArray[Any]) -> NDArray[Any]:
    """[n], with the fields `text` and those of `numbers` [n]."""
    import numpy as np

    written = np.array([text.encode() for text in texts], dtype=np.bytes_)
    found = np.empty(len(texts), dtype=[("text", written.dtype), *((name, of.dtype) for name, of in numbers.items())])
    found["text"] = written
    for name, values in numbers.items():
        found[name] = values
    return found


def texts_of(outputs: NDArray[Any]) -> list[str]:
    return [text.decode() for text in outputs["text"].tolist()]


def changed(outputs: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.intp]:
    """The rows whose text is another than the reference's."""
    import numpy as np

    return np.flatnonzero(outputs["text"] != reference["text"])


def fidelity(outputs: NDArray[Any], reference: NDArray[Any], number: str) -> dict[str, Any]:
    """`flips`: rows with another text, `flip_rate` their share; `difference`: of the field `number`, absolute."""
    import numpy as np

    from optimize.evaluate.fidelity import spread

    flips = len(changed(outputs, reference))
    apart = np.abs(outputs[number].astype(np.float64) - reference[number])
    return {"n": len(outputs), "flips": flips, "flip_rate": flips / len(outputs), "difference": spread(apart)}


def flips(
    rows: pa.Table,
    outputs: NDArray[Any],
    reference: NDArray[Any],
    answers: Callable[[NDArray[Any]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """The rows whose text is another than the reference's, each with its columns and both answers."""
    rows_changed = changed(outputs, reference)
    if not len(rows_changed):
        return []
    before, after = answers(reference[rows_changed]), answers(outputs[rows_changed])
    return [
        {"row": row, **columns, "baseline": then, "candidate": now}
        for row, columns, then, now in zip(
            rows_changed.tolist(), rows.take(rows_changed).to_pylist(), before, after, strict=True
        )
    ]
