"""Does an exported file answer like its parent? Asked of real validation rows, of several lengths and batch sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimize import runtimes
from optimize.errors import StageError

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.context import Context
    from optimize.tasks import Inputs

_CHECKED_ROWS = 33


class Check:
    """Batches of validation rows in the order in which they are asked: the last is the largest, good to trace with."""

    def __init__(self, artifact: Artifact, context: Context, preprocessor: Any) -> None:
        """Raises `StageError` where the recipe keeps no validation rows."""
        if not context.data.num_rows.get("validation"):
            raise StageError(
                "nothing to check the export with", hint="give `data.splits.validation` a share of the rows"
            )
        self._parent = artifact
        self._context = context
        features = context.task.encode(preprocessor, context.data.rows("validation"), artifact.task)
        lengths = [max(map(len, feature.values())) for feature in features]
        self.batches: list[tuple[list[int], Inputs]] = [
            (rows, context.task.collate(preprocessor, [features[row] for row in rows])) for rows in _spread(lengths)
        ]

    def compare(self, format: str, tolerance: float, hint: str) -> dict[str, Any]:
        """What the manifest says of it. Raises `StageError` where an answer is further than `tolerance` (absolute) from
        the parent's.
        """
        task = self._context.task
        ours = runtimes.get(format).open(self._context.directory, threads=1)
        theirs = runtimes.open_artifact(self._parent, threads=1)
        largest = 0.0
        for rows, inputs in self.batches:
            got = task.read_outputs(ours.run(inputs), inputs)
            expected = task.read_outputs(theirs.run(inputs), inputs)
            differences = task.differences(got, expected)
            # A comparison that NaN fails, too.
            wrong = [row for row, difference in zip(rows, differences, strict=True) if not difference <= tolerance]
            if wrong:
                raise StageError(
                    f"the {format} file answers differently from its parent: by {differences.max():.2g} "
                    f"(tolerance {tolerance:g}) on validation row{'s' if len(wrong) > 1 else ''} {_listed(wrong)}, "
                    f"in a batch of {len(rows)}",
                    hint=hint,
                )
            largest = max(largest, float(differences.max()))
        return {
            "tolerance": tolerance,
            # One digit: the rest says more about the processor than about the file.
            "max_difference": float(f"{largest:.0e}"),
            "checked_batches": [len(rows) for rows, _ in self.batches],
        }


def _spread(lengths: list[int]) -> list[list[int]]:
    """Row numbers: the shortest and the longest alone, then an odd and a full batch of rows of all lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    wanted = min(_CHECKED_ROWS, len(order))
    spread = [order[i * (len(order) - 1) // max(1, wanted - 1)] for i in range(wanted)]
    return [spread[:1], spread[-1:], spread[:: max(1, wanted // 7)][:7], spread]


def _listed(rows: list[int]) -> str:
    return ", ".join(str(row + 1) for row in rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
