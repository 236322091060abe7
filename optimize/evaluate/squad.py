"""Exact match and F1 of answers that are texts, as the evaluation script of SQuAD 2.0 has them.

Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250, and 2018, https://arxiv.org/abs/1806.03822.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optimize.tasks import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and repeated white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: str) -> float:
    return float(normalise(answer) == normalise(accepted))


def f1(answer: str, accepted: str) -> float:
    """Of the two bags of words. Where one of them is empty, whether both are."""
    ours, theirs = normalise(answer).split(), normalise(accepted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def best(score: Callable[[str, str], float], answer: str, accepted: Sequence[str]) -> float:
    """The best score over the accepted answers; where there is none, no answer is the right one."""
    return max(score(answer, one) for one in [text for text in accepted if normalise(text)] or [""])


def _metric(name: str, kind: Any, score: Callable[[str, str], float]) -> Metric:
    def per_row(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        import numpy as np

        answers = (text.decode() for text in outputs["text"].tolist())
        return np.array([best(score, answer, accepted) for answer, accepted in zip(answers, targets, strict=True)])

    def compute(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        return float(per_row(outputs, targets).mean())

    return Metric(name, higher_is_better=True, kind=kind, compute=compute, per_row=per_row)


EXACT_MATCH = _metric("exact_match", "binary", exact_match)
F1 = _metric("f1", "rows", f1)
