"""How well vectors of sentences tell which belong together, of pairs of them [n, 2, D]."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from optimize.tasks import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 4_000_000
"""Similarities held at a time."""


def cosines(pairs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the two vectors of each pair, [n]."""
    import numpy as np

    first, second = (_unit(pairs[:, side]) for side in (0, 1))
    return np.asarray((first * second).sum(axis=1))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    vectors_64 = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors_64, axis=1, keepdims=True)
    return np.divide(vectors_64, lengths, out=np.zeros_like(vectors_64), where=lengths > 0)  # type: ignore[no-any-return]


def _judged(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """Similarity by the model and by people, [n, 2]."""
    import numpy as np

    if not len(targets):
        raise ValueError("the rows have no scores: set data.score")
    return np.stack([cosines(outputs), targets.astype(np.float64)], axis=1)


def _spearman_of(judged: NDArray[np.float64]) -> float:
    """The correlation of ranks, ties at their mean rank; NaN where one side is all the same."""
    import numpy as np
    from scipy.stats import rankdata

    ranks = rankdata(judged, axis=0)
    ranks -= ranks.mean(axis=0)
    spread = float(np.sqrt((ranks**2).sum(axis=0).prod()))
    return float(ranks.prod(axis=1).sum() / spread) if spread > 0 else float("nan")


def _spearman(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return _spearman_of(_judged(outputs, targets))


def _found(best: int, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """Whether a row's own second text is among the `best` most similar ones of all rows' second texts to its first.

    A text that is as similar as the own one (a copy of it) does not count against it.
    """
    import numpy as np

    queries, corpus = (_unit(outputs[:, side]) for side in (0, 1))
    own = (queries * corpus).sum(axis=1)
    ahead = np.empty(len(own), dtype=np.int64)
    block = max(1, BLOCK // len(own))
    for start in range(0, len(own), block):
        part = slice(start, start + block)
        # Rounding must not put a text behind its copy.
        ahead[part] = (queries[part] @ corpus.T > own[part, None] + 1e-12).sum(axis=1)
    return (ahead < best).astype(np.float64)


def _recall(best: int, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return float(_found(best, outputs, targets).mean())


def _recall_at(best: int) -> Metric:
    return Metric(
        f"recall_at_{best}",
        higher_is_better=True,
        kind="binary",
        compute=partial(_recall, best),
        per_row=partial(_found, best),
    )


SPEARMAN = Metric(
    "spearman", higher_is_better=True, kind="set", compute=_spearman, per_row=_judged, from_rows=_spearman_of
)
RECALL_AT_1, RECALL_AT_5, RECALL_AT_10 = map(_recall_at, (1, 5, 10))
"""Rows are queries, and all their second texts together what is searched: that stays as it is when rows are drawn."""
