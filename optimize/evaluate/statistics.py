"""Intervals in closed form or by a root: pure functions, seedless. What resamples stands in `bootstrap.py`.

Every interval is two-sided at `confidence`; one end of it is a one-sided test at (1 - confidence) / 2.
`docs/statistics.md` says which one decides what, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from optimize.evaluate.types import Interval

NUDGE = 1e-9
"""How far from the estimate the search for an interval's end begins: where every pair agrees the score statistic has a
second, trivial root at the estimate itself."""
MANY = 10**9
"""A sample larger than anybody has is not worth naming."""


def tango_interval(b: int, c: int, n: int, confidence: float) -> Interval:
    """Score interval of the difference of two paired proportions, candidate - over.

    `b` rows are right for the candidate only, `c` for the other only, of `n` rows. The interval holds each difference d
    whose score statistic (b - c - n d) / sqrt(n (2 q + d (1 - d))) lies within the normal quantile, q being the
    likeliest share of rows of the second sort under d. It keeps its level for small n and where b = c = 0.
    Source: T. Tango, Statistics in Medicine 17, 891-908 (1998).
    """
    _check_counts(0, b, c, n)
    z = _quantile(confidence)
    return _tango_lower(b, c, n, z), -_tango_lower(c, b, n, z)


def _tango_lower(b: int, c: int, n: int, z: float) -> float:
    def excess(d: float) -> float:
        linear = (2 * n - b + c) * d - b - c
        root = math.sqrt(max(linear**2 + 8 * n * c * d * (1 - d), 0.0))
        # The same root of 2n q^2 + linear q - c d (1 - d) = 0, in the form that does not cancel.
        q = (root - linear) / (4 * n) if linear <= 0 else 2 * c * d * (d - 1) / (-linear - root)
        return b - c - n * d - z * math.sqrt(n * max(2 * q + d * (1 - d), 0.0))

    estimate = (b - c) / n
    return -1.0 if c == n else _root(excess, -1.0, estimate - NUDGE)


def tang_interval(both: int, b: int, c: int, n: int, confidence: float) -> Interval:
    """Score interval of the ratio of two paired proportions, candidate / over: the share of accuracy that was kept.

    `both` rows are right for both, `b` and `c` for one only, as in `tango_interval`. The statistic of a ratio r is
    (both + b - r (both + c)) / sqrt(n r (p10 + p01)), with the likeliest shares under r. The upper end is infinite
    where the other is never right.
    Sources: J. Nam, W. Blackwelder, Statistics in Medicine 21, 689-699 (2002); N. Tang, M. Tang, I. Chan, ibid. 22,
    1217-1233 (2003).
    """
    _check_counts(both, b, c, n)
    z = _quantile(confidence)
    upper = _tang_lower(both, c, b, n, z)
    return _tang_lower(both, b, c, n, z), 1 / upper if upper else math.inf


def _tang_lower(both: int, b: int, c: int, n: int, z: float) -> float:
    candidate, over = both + b, both + c
    if not candidate:
        return 0.0

    def excess(log_ratio: float) -> float:
        r = math.exp(log_ratio)
        linear = r**2 * (over + 2 * b) - candidate
        root = math.sqrt((candidate - r**2 * over) ** 2 + 4 * r**2 * b * c)
        p01 = max((linear + root) / (2 * n * r * (r + 1)), 0.0)
        p10 = max(r * p01 - (r - 1) * (both + b + c) / n, 0.0)
        return candidate - r * over - z * math.sqrt(n * r * (p10 + p01))

    start = math.log(candidate / max(over, NUDGE))
    step = 1.0
    while excess(start - step) <= 0:
        step *= 2
    return math.exp(_root(excess, start - step, start - NUDGE))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's test: could `b` against `c` flips be a fair coin? 1 where nothing flipped."""
    from scipy.stats import binomtest

    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def wilson_interval(successes: int, n: int, confidence: float) -> Interval:
    """Score interval of a proportion. Source: E. Wilson, JASA 22, 209-212 (1927)."""
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def mean_interval(values: ArrayLike, confidence: float, *, fewest: int | None = None) -> Interval:
    """Student's t interval of the mean of independent values, such as one log ratio a round. Infinite below two.

    `fewest` is for values that were taken one by one until the interval was narrow enough: the number at which that
    could first have ended. Who stops when the spread looks small stops where it is underestimated, and the plain
    interval then holds the truth in as few as 86 % instead of 90. Counting only half of the degrees of freedom, once
    that is more than the first `fewest` have, brings it back to 88 to 92 % (`benchmarks/intervals.py`).
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    n = array.size
    if n < 2:
        return -math.inf, math.inf
    degrees = n - 1 if fewest is None else max(min(n, fewest) - 1, (n - 1) / 2)
    half = float(stdtrit(degrees, 0.5 + confidence / 2)) * array.std(ddof=1) / math.sqrt(n)
    return float(array.mean() - half), float(array.mean() + half)


def geometric_mean_interval(log_values: ArrayLike, confidence: float, *, fewest: int | None = None) -> Interval:
    """`mean_interval` of logarithms, as the interval of the geometric mean: a round's log ratios give a speed-up."""
    low, high = mean_interval(log_values, confidence, fewest=fewest)
    return float(np.exp(low)), float(np.exp(high))


def sample_needed(n: int, estimate: float, ci: Interval, limit: float) -> int | None:
    """The rows or rounds at which, were the estimate to stay, its interval would leave `limit` outside.

    Widths go by 1 / sqrt(n). Ratios and speed-ups of rounds are given as logarithms. None where no sample settles it,
    the estimate being on the limit, or where nothing can be told yet.
    """
    reach = estimate - ci[0] if limit < estimate else ci[1] - estimate
    margin = abs(estimate - limit)
    if not margin or not math.isfinite(reach):
        return None
    needed = n * (reach / margin) ** 2
    return math.ceil(needed) if needed <= MANY else None


def _quantile(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(0.5 + confidence / 2))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq

    return float(brentq(function, low, high, xtol=1e-12))


def _check_counts(both: int, b: int, c: int, n: int) -> None:
    if n < 1 or min(both, b, c) < 0 or both + b + c > n:
        raise ValueError(f"counts that can't be: both={both}, b={b}, c={c} of n={n}")
