"""A task's metric on two models' answers to the same rows: which interval serves which kind of metric."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.errors import EvaluationError
from optimize.evaluate.bootstrap import Resampled, resample_confusion, resample_means, resample_rows, resample_sums
from optimize.evaluate.statistics import mcnemar_exact, tang_interval, tango_interval, wilson_interval
from optimize.evaluate.types import Interval
from optimize.tasks import Metric


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `details` as in `Comparison`."""

    estimate: float
    ci: Interval
    n: int
    details: Mapping[str, Any] = field(default_factory=dict)


def score_answers(metric: Metric, outputs: NDArray[Any], targets: NDArray[Any], confidence: float) -> Estimate:
    """One model's own value. `outputs` [n, ...], `targets` [n, ...] (empty where the outputs tell all)."""
    n = len(outputs)
    with _said_of(metric):
        if metric.kind == "binary":
            hits = int(_per_row(metric, outputs, targets).sum())
            return Estimate(hits / n, wilson_interval(hits, n, confidence), n)
        resampled = _resample(metric, [outputs], targets)
        return Estimate(float(resampled.point[0]), resampled.interval("value", confidence), n)


def compare_answers(
    metric: Metric, candidate: NDArray[Any], over: NDArray[Any], targets: NDArray[Any], confidence: float
) -> Estimate:
    """The difference candidate - over, with the ratio in `details`; for 0/1 outcomes the flips both ways as well."""
    with _said_of(metric):
        if metric.kind == "binary":
            return compare_hits(_per_row(metric, candidate, targets), _per_row(metric, over, targets), confidence)
        resampled = _resample(metric, [candidate, over], targets)
        ours, theirs = (float(value) for value in resampled.point)
        ratio = {
            "estimate": ours / theirs if theirs > 0 else math.nan,
            "ci": resampled.interval("ratio", confidence),
        }
        difference = resampled.interval("difference", confidence)
        return Estimate(ours - theirs, difference, len(candidate), {"ratio": ratio})


def compare_hits(candidate: NDArray[Any], over: NDArray[Any], confidence: float) -> Estimate:
    """`compare_answers` for right (1) and wrong (0) answers, [n] each."""
    ours, theirs = candidate.astype(bool), over.astype(bool)
    n = len(ours)
    both, b, c = int((ours & theirs).sum()), int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    details = {
        "ratio": {
            "estimate": (both + b) / (both + c) if both + c else math.nan,
            "ci": tang_interval(both, b, c, n, confidence),
        },
        "flips": {"gained": b, "lost": c},
        "mcnemar_p": mcnemar_exact(b, c),
    }
    return Estimate((b - c) / n, tango_interval(b, c, n, confidence), n, details)


@contextlib.contextmanager
def _said_of(metric: Metric) -> Iterator[None]:
    """A metric may be the user's own function: what goes wrong in it is an error of that name."""
    try:
        yield
    except Exception as error:
        raise EvaluationError(
            f"metric {metric.name} can't be computed: {type(error).__name__}: {error}",
            hint="it takes (outputs [n, ...], targets [n, ...]) and returns a number, NaN where that is undefined;"
            " it is also called on resampled rows, which may lack a class",
        ) from error


def _per_row(metric: Metric, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    if metric.per_row is None:
        raise TypeError(f"metric {metric.name} is of kind {metric.kind} and has no per_row")
    return metric.per_row(outputs, targets)


def _resample(metric: Metric, outputs: Sequence[NDArray[Any]], targets: NDArray[Any]) -> Resampled:
    if metric.kind == "rows":
        return resample_means(np.stack([_per_row(metric, answers, targets) for answers in outputs], axis=1))
    if metric.kind == "sums" and metric.from_sums is not None:
        sums = np.stack([_per_row(metric, answers, targets) for answers in outputs], axis=1)
        return resample_sums(metric.from_sums, sums)
    if metric.from_rows is not None:
        of_rows = metric.from_rows
        rows = [_per_row(metric, answers, targets) for answers in outputs]
        return resample_rows(lambda values, _: of_rows(values), rows, targets)
    if metric.from_confusion is not None:
        return resample_confusion(metric.from_confusion, [answers.argmax(axis=-1) for answers in outputs], targets)
    return resample_rows(metric.compute, outputs, targets)
