"""Do the 90 % intervals hold the truth in 90 %? Simulation of every interval that decides a gate.

    python benchmarks/intervals.py [--trials 4000] [--only bootstrap]

Prints how often each interval held the true value, and how often the truth lay below and above it (5 % each is what a
gate relies on). Exits with 1 where a coverage is outside 88 to 92 %. Takes about five minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.evaluate.bootstrap import resample_confusion, resample_means, resample_sums
from optimize.evaluate.metrics import MACRO_F1, MATTHEWS, PERPLEXITY
from optimize.evaluate.statistics import mean_interval, tang_interval, tango_interval, wilson_interval
from optimize.evaluate.types import CONFIDENCE, Interval

Trial = Callable[[np.random.Generator], Interval]
TOLERATED = (0.88, 0.92)
BOOTSTRAP_SHARE = 2
"""A bootstrap takes a hundred times as long as a closed form: it gets one trial where that gets so many."""


def accuracy(n: int, gained: float, lost: float, both: float = 0.8) -> Iterator[tuple[str, float, Trial]]:
    """Rows right for both models, for the candidate only, for the other only, with these probabilities."""
    shares = [both, gained, lost, 1 - both - gained - lost]
    label = f"n={n}, {gained:.1%} of rows flip to right, {lost:.1%} to wrong"

    def difference(generator: np.random.Generator) -> Interval:
        _, b, c, _ = generator.multinomial(n, shares)
        return tango_interval(int(b), int(c), n, CONFIDENCE)

    def ratio(generator: np.random.Generator) -> Interval:
        a, b, c, _ = generator.multinomial(n, shares)
        return tang_interval(int(a), int(b), int(c), n, CONFIDENCE)

    yield f"tango, difference: {label}", gained - lost, difference
    yield f"tang, ratio: {label}", (both + gained) / (both + lost), ratio


def proportion(n: int, p: float) -> Iterator[tuple[str, float, Trial]]:
    yield f"wilson: n={n}, accuracy {p}", p, lambda generator: wilson_interval(generator.binomial(n, p), n, CONFIDENCE)


def population(classes: int) -> NDArray[np.float64]:
    """Probabilities [target, candidate's answer, other's answer]: unbalanced classes, models that err alike."""
    prior = np.arange(classes, 0, -1.0) ** 1.5
    confused = np.full((classes, classes), 0.16 / (classes - 1))
    np.fill_diagonal(confused, 0.84)
    changed = np.full((classes, classes), 0.06 / (classes - 1))
    np.fill_diagonal(changed, 0.94)
    table = prior[:, None, None] * confused[:, None, :] * changed.T[None, :, :]
    return np.asarray(table / table.sum())


def of_classes(n: int, classes: int) -> Iterator[tuple[str, float, Trial]]:
    table = population(classes)
    for metric in (MACRO_F1, MATTHEWS):
        statistic: Any = metric.from_confusion
        ours, theirs = (float(statistic(1e9 * table.sum(axis=axis))) for axis in (2, 1))
        for contrast, truth in (("difference", ours - theirs), ("ratio", ours / theirs)):

            def trial(generator: np.random.Generator, statistic: Any = statistic, contrast: Any = contrast) -> Interval:
                rows = generator.choice(table.size, size=n, p=table.ravel())
                targets, candidate, over = np.unravel_index(rows, table.shape)
                resampled = resample_confusion(
                    statistic, [candidate, over], targets, resamples=1_999, seed=int(generator.integers(2**32))
                )
                return resampled.interval(contrast, CONFIDENCE)

            yield f"bootstrap, {metric.name} {contrast}: n={n}, {classes} classes", truth, trial


def of_rows(n: int) -> Iterator[tuple[str, float, Trial]]:
    """A skewed number a row, such as a loss, of two models that agree in most of it."""

    def trial(generator: np.random.Generator) -> Interval:
        over = generator.exponential(1.0, n)
        values = np.stack([over + generator.exponential(0.5, n), over], axis=1)
        seed = int(generator.integers(2**32))
        return resample_means(values, resamples=999, seed=seed).interval("difference", CONFIDENCE)

    yield f"bootstrap, mean difference of skewed rows: n={n}", 0.5, trial


def of_windows(n: int) -> Iterator[tuple[str, float, Trial]]:
    """Log-likelihoods of tokens that depend on each other: some windows are harder, some lose more than others, and
    what a token loses goes on in the next ones.
    """
    from scipy.signal import lfilter

    tokens, loss, kept = 256, 0.03, 0.6
    statistic: Any = PERPLEXITY.from_sums

    def trial(generator: np.random.Generator) -> Interval:
        over = generator.gamma(9.0, 1 / 3, n)[:, None] + generator.exponential(1.0, (n, tokens)) - 1
        shocks = generator.exponential(0.3, (n, tokens)) - 0.3
        lost = loss + generator.normal(0.0, 0.03, n)[:, None] + lfilter([1 - kept], [1, -kept], shocks, axis=1)
        sums = np.stack([-np.sum(over + lost, axis=1), -np.sum(over, axis=1)], axis=1)
        values = np.stack([sums, np.full((n, 2), float(tokens))], axis=2)
        seed = int(generator.integers(2**32))
        return resample_sums(statistic, values, resamples=1_999, seed=seed).interval("ratio", CONFIDENCE)

    yield f"bootstrap, perplexity ratio: {n} windows of {tokens} dependent tokens", float(np.exp(loss)), trial


def latency(deviation: float, watched: int) -> Iterator[tuple[str, float, Trial]]:
    """Rounds until every one of the `watched` log ratios is narrow enough, or to the budget; the first is examined.

    All are over one baseline, whose own scatter they share; `deviation` is a ratio's from round to round.
    """
    fewest, most, half_width, truth = 6, 40, 0.03, 0.4

    def trial(generator: np.random.Generator) -> Interval:
        baseline, *others = generator.normal(0.0, deviation / 2**0.5, (1 + watched, most))
        ratios = [truth + baseline - other for other in others]
        for n in range(fewest, most + 1):
            intervals = [mean_interval(one[:n], CONFIDENCE, fewest=fewest) for one in ratios]
            if all(high - low <= 2 * half_width for low, high in intervals):
                break
        return intervals[0]

    yield f"student: {deviation:.0%} from round to round, until {watched} narrow", truth, trial


def cases() -> Iterator[tuple[str, float, Trial]]:
    for n in (300, 1000, 2559, 8000):
        yield from accuracy(n, 0.03, 0.03)
        yield from accuracy(n, 0.02, 0.05)
        yield from proportion(n, 0.84)
    for n, classes in ((500, 2), (500, 4), (2559, 2)):
        yield from of_classes(n, classes)
    for n in (500, 2559):
        yield from of_rows(n)
    for n in (32, 64, 560):
        yield from of_windows(n)
    for deviation in (0.01, 0.03, 0.05, 0.07, 0.10, 0.15):
        for watched in (1, 3):
            yield from latency(deviation, watched)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    outside = 0
    print(f"{'interval':<78} {'trials':>6} {'held':>7} {'below':>7} {'above':>7}")
    for seed, (name, truth, trial) in enumerate(cases()):
        if arguments.only not in name:
            continue
        trials = arguments.trials // (BOOTSTRAP_SHARE if name.startswith("bootstrap") else 1)
        generator = np.random.default_rng(seed)
        ends = np.array([trial(generator) for _ in range(trials)])
        below, above = float((truth < ends[:, 0]).mean()), float((truth > ends[:, 1]).mean())
        held = 1 - below - above
        wrong = not TOLERATED[0] <= held <= TOLERATED[1]
        outside += wrong
        print(
            f"{name:<78} {trials:>6} {held:>7.1%} {below:>7.1%} {above:>7.1%}{'  OUTSIDE' if wrong else ''}", flush=True
        )
    print(f"{outside} outside {TOLERATED[0]:.0%} to {TOLERATED[1]:.0%}" if outside else "all within 90 +/- 2 %")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
