"""The paired BCa bootstrap over rows, for metrics that only a set of rows has (F1, Matthews) or that are no 0/1 means.

Every resample draws the same rows for both models, so what they share cancels out. Where a metric is a function of the
confusion matrix, rows with the same (target, answer, answer) are interchangeable, and drawing n rows with replacement
is drawing one multinomial over those few cells: the same distribution, without touching a row.
Sources: B. Efron, JASA 82, 171-185 (1987), for BCa; B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimize.evaluate.types import Interval

Floats = NDArray[np.float64]
Contrast = Literal["value", "difference", "ratio"]

RESAMPLES = 9_999
ROW_RESAMPLES = 1_999
"""Where every resample calls a function on all rows. The noise of the 5 % quantile's level is then half a percent."""
FEWEST_ROWS = 20
"""Fewer tell nothing about those that were not drawn: one row, resampled, is always itself."""
JACKKNIFE_GROUPS = 200
"""Rows left out together, to learn the skewness; the acceleration does not depend on the number."""
BLOCK = 4_000_000
"""Numbers held at a time."""


@dataclass(frozen=True)
class Resampled:
    """A metric on the rows as they are, resampled, and with some left out, for m models at once (candidate first)."""

    point: Floats
    """[m]"""
    replicates: Floats
    """[resamples, m]"""
    jackknife: Floats
    """[groups, m]"""
    weights: Floats
    """[groups]: how many groups of rows are alike this one"""

    def interval(self, contrast: Contrast, confidence: float) -> Interval:
        """BCa interval of the first model's value, or of candidate - over, or of candidate / over.

        Where every resample gives the same (answers that never differ) it is that one number. It is NaN where the
        metric is, and infinite where there are fewer than `FEWEST_ROWS` or where more than one resample in twenty is
        undefined or, for a ratio, has no positive divisor.
        """
        point, replicates, jackknife = (
            _contrast(values, contrast) for values in (self.point, self.replicates, self.jackknife)
        )
        if not np.isfinite(point):
            return math.nan, math.nan
        finite = replicates[np.isfinite(replicates)]
        if self.weights.sum() < FEWEST_ROWS or finite.size < 0.95 * replicates.size:
            return -math.inf, math.inf
        return _bca(float(point), finite, jackknife, self.weights, confidence)


def resample_means(values: Floats, *, resamples: int = ROW_RESAMPLES, seed: int = 0) -> Resampled:
    """For a metric that is the mean of one number a row. `values` [n, m]."""
    n = len(values)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // values.size)
    replicates = [
        values[generator.integers(n, size=(min(block, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    total = values.sum(axis=0)
    return Resampled(total / n, np.concatenate(replicates), (total - values) / max(n - 1, 1), np.ones(n))


def resample_sums(
    statistic: Callable[[Floats], Floats], values: Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """For a metric that is a function of sums over rows, such as a ratio of two. `values` [n, m, k] of m models;
    `statistic`: sums [..., k] -> [...].
    """
    n = len(values)
    flat = values.reshape(n, -1)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // n)

    def evaluate(sums: Floats) -> Floats:
        return statistic(sums.reshape(-1, *values.shape[1:]))

    # Drawing n rows is drawing how often each is drawn.
    replicates = [
        evaluate(generator.multinomial(n, np.full(n, 1 / n), size=min(block, resamples - start)) @ flat)
        for start in range(0, resamples, block)
    ]
    total = flat.sum(axis=0)
    one_less = evaluate(total - flat) if n > 1 else np.empty((0, values.shape[1]))
    return Resampled(evaluate(total)[0], np.concatenate(replicates), one_less, np.ones(len(one_less)))


def resample_confusion(
    statistic: Callable[[NDArray[np.int64]], Floats],
    predictions: Sequence[NDArray[np.integer[Any]]],
    targets: NDArray[np.integer[Any]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Resampled:
    """For a metric that is a function of the confusion matrix.

    `predictions`: m arrays [n] of classes from 0; `targets` [n]; `statistic`: counts [..., target, answer] -> [...].
    """
    columns = np.stack([targets, *predictions], axis=1).astype(np.int64)
    cells, counts = np.unique(columns, axis=0, return_counts=True)
    classes = int(columns.max()) + 1
    tabulate = [_tabulator(cells[:, 0] * classes + cells[:, 1 + model], classes) for model in range(len(predictions))]
    block = max(1, BLOCK // max(len(cells), classes**2))

    def evaluate(tables: NDArray[np.int64]) -> Floats:
        return np.stack([statistic(table(tables)) for table in tabulate], axis=-1)

    generator = np.random.default_rng(seed)
    shares = counts / counts.sum()
    replicates = [
        evaluate(generator.multinomial(len(targets), shares, size=min(block, resamples - start)))
        for start in range(0, resamples, block)
    ]
    one_less = [
        evaluate(counts - np.eye(min(block, len(cells) - start), len(cells), k=start, dtype=np.int64))
        for start in range(0, len(cells), block)
    ]
    return Resampled(
        evaluate(counts[None])[0], np.concatenate(replicates), np.concatenate(one_less), counts.astype(np.float64)
    )


def resample_rows(
    statistic: Callable[[NDArray[Any], NDArray[Any]], float],
    outputs: Sequence[NDArray[Any]],
    targets: NDArray[Any],
    *,
    resamples: int = ROW_RESAMPLES,
    seed: int = 0,
) -> Resampled:
    """For any function of (outputs [n, ...], targets [n, ...] or empty); `outputs` are m models'."""
    n = len(outputs[0])
    generator = np.random.default_rng(seed)

    def evaluate(rows: NDArray[np.int64]) -> list[float]:
        return [statistic(answers[rows], targets[rows] if len(targets) else targets) for answers in outputs]

    replicates = [evaluate(generator.integers(n, size=n)) for _ in range(resamples)]
    everything = np.arange(n)
    # Shuffled, since files come sorted by label and a group should be like any other.
    groups = np.array_split(generator.permutation(n), min(n, JACKKNIFE_GROUPS))
    one_less = [evaluate(np.setdiff1d(everything, group, assume_unique=True)) for group in groups] if n > 1 else []
    return Resampled(
        np.array(evaluate(everything)),
        np.array(replicates),
        np.array(one_less).reshape(-1, len(outputs)),
        np.ones(len(one_less)),
    )


def _tabulator(codes: NDArray[np.int64], classes: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """Cell counts [k, cells] -> one model's confusion matrices [k, classes, classes]; `codes`: each cell's entry."""
    order = np.argsort(codes, kind="stable")
    entries, starts = np.unique(codes[order], return_index=True)

    def tabulate(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        tables = np.zeros((len(counts), classes * classes), dtype=np.int64)
        tables[:, entries] = np.add.reduceat(counts[:, order], starts, axis=1)
        return tables.reshape(-1, classes, classes)

    return tabulate


def _contrast(values: Floats, contrast: Contrast) -> Floats:
    candidate = values[..., 0]
    if contrast == "value":
        return candidate
    over = values[..., 1]
    if contrast == "difference":
        return candidate - over
    return np.divide(candidate, over, out=np.full_like(candidate, np.nan), where=over > 0)


def _bca(point: float, replicates: Floats, jackknife: Floats, weights: Floats, confidence: float) -> Interval:
    from scipy.special import ndtr, ndtri

    low, high = float(replicates.min()), float(replicates.max())
    if low == high:
        return min(low, point), max(high, point)
    below = ((replicates < point).mean() + (replicates <= point).mean()) / 2
    edge = 1 / (replicates.size + 1)
    bias = ndtri(np.clip(below, edge, 1 - edge))
    influence = np.average(jackknife, weights=weights) - jackknife
    spread = np.sum(weights * influence**2) ** 1.5
    skewness = np.sum(weights * influence**3) / (6 * spread) if spread > 0 else 0.0
    shift = bias + ndtri([0.5 - confidence / 2, 0.5 + confidence / 2])
    levels = ndtr(bias + shift / (1 - skewness * shift))
    ends = np.quantile(replicates, levels)
    # Over few distinct values the bias correction can carry the interval past the estimate itself.
    return min(float(ends[0]), point), max(float(ends[1]), point)
