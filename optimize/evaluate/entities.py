"""Entities in a row of tags, and how well they are found: F1 of exact spans, as CoNLL-2003's `conlleval` counts it.

A tag is `O`, or a prefix and a type, such as `B-PER`. Every scheme is read alike (IOB1, IOB2, BIOES, BILOU, plain
types): a word goes on the entity of the word before where both have the same type, its own prefix says inside or end,
and that of the word before begin or inside. Any other tag begins an entity. This is what seqeval does by default
(https://github.com/chakki-works/seqeval).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from optimize.evaluate.metrics import of_sums

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLUM])[-_](.+)")
_OPENS, _GOES_ON = frozenset("BIM"), frozenset("IMEL")


class Entity(NamedTuple):
    """The words `start` up to, not including, `end`."""

    label: str
    start: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """What a row of tags, one a word, says."""
    found: list[Entity] = []
    before, label_before = OUTSIDE, ""
    for word, tag in enumerate(tags):
        match = _TAG.fullmatch(tag)
        prefix, label = match.groups() if match else (OUTSIDE if tag == OUTSIDE else "I", tag)
        if prefix in _GOES_ON and before in _OPENS and label == label_before:
            found[-1] = found[-1]._replace(end=word + 1)
        elif prefix != OUTSIDE:
            found.append(Entity(label, word, word + 1))
        before, label_before = prefix, label
    return found


def counts(answered: Sequence[str], wanted: Sequence[str]) -> tuple[int, int, int]:
    """(entities that are in both, exactly; entities answered; entities wanted)."""
    ours, theirs = entities(answered), entities(wanted)
    return len(set(ours) & set(theirs)), len(ours), len(theirs)


def _entities(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """[n, 3], as `counts`."""
    return outputs["entities"].astype("float64")


def _words(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """[n, 2]: words tagged right, words."""
    return outputs["words"].astype("float64")


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 of nothing, as seqeval has it."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _f1_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return _share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _precision_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return _share(sums[..., 0], sums[..., 1])


def _recall_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return _share(sums[..., 0], sums[..., 2])


def _accuracy_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return _share(sums[..., 0], sums[..., 1])


ENTITY_F1 = of_sums("entity_f1", _entities, _f1_of)
ENTITY_PRECISION = of_sums("entity_precision", _entities, _precision_of)
ENTITY_RECALL = of_sums("entity_recall", _entities, _recall_of)
TOKEN_ACCURACY = of_sums("token_accuracy", _words, _accuracy_of)
"""Of words, whatever pieces a tokenizer cuts them into. All of these take records as
`optimize.tasks.token_classification` makes them."""
