"""Heads that choose one label out of several: the labels in a model's config against the data's, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import SourceError
from optimize.tasks.columns import listed
from optimize.tasks.pretrained import read_config

if TYPE_CHECKING:
    from numpy.typing import NDArray


def labels_of(config: Mapping[str, Any], path: Path) -> list[str]:
    """The names in a model's config.json, in the order of its outputs. Raises `SourceError` where that makes no sense
    or the head is for something else than one label.
    """
    try:
        # transformers leaves the names out of config.json where they are these.
        named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))}
        names = [str(named[i]) for i in sorted(named, key=int)]
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise SourceError(f"config.json makes no sense: {error}", location=str(path)) from error
    if (kind := config.get("problem_type")) in ("regression", "multi_label_classification"):
        raise SourceError(f"the model's head is for {kind.replace('_', ' ')}, not for one label")
    return names


def check_labels(theirs: Sequence[str], ours: Sequence[str], otherwise: str) -> None:
    """Raise `SourceError` where a trained head's labels are not the data's; `otherwise` ends the hint."""
    theirs, ours = list(theirs), list(ours)
    generic = theirs == [f"LABEL_{i}" for i in range(len(theirs))]
    if theirs == ours or (generic and ours == [str(i) for i in range(len(theirs))]):
        return
    told = f"labels that don't match the model: the data has {listed(ours)}, the model {listed(theirs)}"
    if sorted(theirs) == sorted(ours):
        raise SourceError(f"{told}, in another order", hint=f"set data.labels in the model's order: {theirs}")
    if generic and len(theirs) == len(ours):
        example = ", ".join(f"{a}: {b}" for a, b in zip(ours, theirs, strict=True))
        raise SourceError(told, hint=f"say which is which, as in data.labels: {{{example}}}")
    raise SourceError(
        told,
        hint="map the data's values to the model's names with data.labels (value: name), in the model's order, "
        f"{otherwise}",
    )


def has_head(
    path: Path,
    head: str,
    labels: Sequence[str],
    otherwise: str = "or start from a model without a classification head",
) -> bool:
    """Whether the model in a folder is of an architecture whose name ends so; False where a head is to be made.

    Raises `SourceError` where the head is there, but for other labels than these; `otherwise` ends its hint.
    """
    config = read_config(path / "config.json")
    try:
        found = any(name.endswith(head) for name in config.get("architectures") or ())
    except (AttributeError, TypeError) as error:
        raise SourceError(f"config.json makes no sense: {error}", location=str(path)) from error
    if found:
        check_labels(labels_of(config, path), labels, otherwise)
    return found


def answers(outputs: NDArray[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """[{"label": name, "score": its probability}] of logits [n, labels], a row each."""
    import numpy as np

    powers = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    return [{"label": labels[i], "score": float(row[i])} for row, i in zip(shares, best, strict=True)]
