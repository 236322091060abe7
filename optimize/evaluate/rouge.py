"""ROUGE-1, ROUGE-2 and ROUGE-L, as F1 of a text and one reference (Lin, 2004, https://aclanthology.org/W04-1013).

Tokens are runs of letters and digits in lower case, without stemming: on English text the numbers are those of the
package `rouge-score` by its defaults, which drops every letter that is not ASCII. They lie between 0 and 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optimize.tasks import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOKEN = re.compile(r"[^\W_]+")


def tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def rouge_n(text: str, reference: str, n: int) -> float:
    """Of runs of `n` tokens, each counted as often as both have it."""
    ours, theirs = (
        Counter(zip(*(found[i:] for i in range(n)), strict=False)) for found in map(tokens, (text, reference))
    )
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(text: str, reference: str) -> float:
    """Of the longest sequence of tokens that both have in this order, with gaps."""
    ours, theirs = tokens(text), tokens(reference)
    return _f1(longest_common(ours, theirs), len(ours), len(theirs))


def longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The length of the longest common subsequence: a row of the usual table is the bits of one integer.

    Hyyro, 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, token in enumerate(ours):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = row = (1 << len(ours)) - 1
    for token in theirs:
        met = row & places.get(token, 0)
        row = (row + met | row - met) & everywhere
    return len(ours) - row.bit_count()


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0


def _metric(name: str, score: Callable[[str, str], float]) -> Metric:
    def per_row(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        import numpy as np

        texts = (text.decode() for text in outputs["text"].tolist())
        return np.array([score(text, reference) for text, reference in zip(texts, targets, strict=True)])

    def compute(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        return float(per_row(outputs, targets).mean())

    return Metric(name, higher_is_better=True, kind="rows", compute=compute, per_row=per_row)


ROUGE_1 = _metric("rouge1", lambda text, reference: rouge_n(text, reference, 1))
ROUGE_2 = _metric("rouge2", lambda text, reference: rouge_n(text, reference, 2))
ROUGE_L = _metric("rougeL", rouge_l)
