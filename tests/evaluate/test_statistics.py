"""Intervals: against published tables, against other people's code, by property, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, bootstrap, norm

from optimize.errors import EvaluationError
from optimize.evaluate import bootstrap as resampling
from optimize.evaluate.answers import compare_answers, compare_hits, score_answers
from optimize.evaluate.metrics import ACCURACY, MACRO_F1, MATTHEWS
from optimize.evaluate.statistics import (
    geometric_mean_interval,
    mcnemar_exact,
    mean_interval,
    sample_needed,
    tang_interval,
    tango_interval,
    wilson_interval,
)
from optimize.evaluate.types import Comparison
from optimize.tasks import Metric

CONFIDENCE = 0.90
ROWS = 8_000


@st.composite
def paired_counts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(both, b, c, n)"""
    n = draw(st.integers(1, 5_000))
    b = draw(st.integers(0, n))
    c = draw(st.integers(0, n - b))
    return draw(st.integers(0, n - b - c)), b, c, n


def within_binomial_99(held: int, trials: int, p: float = CONFIDENCE) -> bool:
    """At the true level, fewer hits than this come in one of a hundred."""
    return held >= binom.ppf(0.01, trials, p)


# --- published values and independent code ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "confidence", "difference", "ratio"),
    [
        # Airway hyper-responsiveness (Bentur et al. 2009) and complete response (Cavo et al. 2012), as tabulated in
        # Fagerland, Lydersen, Laake: Statistical Analysis of Contingency Tables (2017), chapter 8.
        ((1, 1, 7, 21), 0.95, (-0.517, -0.026), (0.065, 0.907)),
        ((59, 6, 16, 161), 0.95, (-0.1240, -0.0054), (0.7476, 0.9876)),
        # R: PropCIs::scoreci.mp(25, 28, 618, 0.90), whose estimate is (second - first) / n
        ((0, 28, 25, 618), 0.90, (-0.0148, 0.0247), None),
    ],
)
def test_score_intervals_have_their_published_values(counts, confidence, difference, ratio):
    both, b, c, n = counts
    digits = 3 if n == 21 else 4
    assert tuple(round(end, digits) for end in tango_interval(b, c, n, confidence)) == difference
    if ratio:
        assert tuple(round(end, digits) for end in tang_interval(both, b, c, n, confidence)) == ratio


@pytest.mark.parametrize(("b", "c", "n"), [(3, 9, 40), (0, 4, 30), (12, 0, 200), (1, 1, 5)])
def test_tango_ends_are_where_the_numerically_maximised_score_statistic_meets_the_quantile(b, c, n):
    def statistic(d: float) -> float:
        def negative_likelihood(q: float) -> float:
            terms = [(b, q + d), (c, q), (n - b - c, 1 - 2 * q - d)]
            return -sum(count * math.log(max(share, 1e-300)) for count, share in terms if count)

        lowest, highest = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(negative_likelihood, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}).x
        return (b - c - n * d) / math.sqrt(n * (2 * q + d - d * d))

    low, high = tango_interval(b, c, n, CONFIDENCE)
    z = norm.ppf(0.95)
    assert statistic(low) == pytest.approx(z, abs=1e-4)
    assert statistic(high) == pytest.approx(-z, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 30, ROWS])
def test_score_intervals_at_the_edges(n):
    z2 = norm.ppf(0.95) ** 2
    assert tango_interval(0, 0, n, CONFIDENCE) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-9)
    assert tango_interval(n, 0, n, CONFIDENCE) == pytest.approx(((n - z2) / (n + z2), 1), abs=1e-9)
    assert tango_interval(0, n, n, CONFIDENCE)[0] == -1
    assert tang_interval(0, 0, n, n, CONFIDENCE)[0] == 0
    assert 0 < tang_interval(0, 0, n, n, CONFIDENCE)[1] < math.inf
    assert tang_interval(0, n, 0, n, CONFIDENCE)[1] == math.inf
    assert tang_interval(0, 0, 0, n, CONFIDENCE) == (0, math.inf)
    with pytest.raises(ValueError, match="can't be"):
        tango_interval(n, 1, n, CONFIDENCE)


def test_mcnemar_and_wilson_are_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_confint

    for b, c in [(0, 0), (3, 9), (40, 12), (1, 0)]:
        expected = mcnemar([[5, b], [c, 5]], exact=True).pvalue if b + c else 1.0
        assert mcnemar_exact(b, c) == pytest.approx(expected)
    for hits, n in [(0, 7), (7, 7), (812, 1000)]:
        expected = proportion_confint(hits, n, alpha=0.1, method="wilson")
        assert wilson_interval(hits, n, CONFIDENCE) == pytest.approx(expected)


def test_bca_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(1.0, (60, 2))
    ours = resampling.resample_means(values, resamples=9_999).interval("difference", CONFIDENCE)
    scipys = bootstrap(
        (values[:, 0], values[:, 1]),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=9_999,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours == pytest.approx(tuple(scipys), abs=0.03 * (scipys.high - scipys.low))


# --- properties -------------------------------------------------------------------------------------------------------


@given(paired_counts(), st.floats(0.5, 0.99))
@settings(max_examples=300, deadline=None)
def test_score_intervals_hold_the_estimate_mirror_and_grow_with_confidence(counts, confidence):
    both, b, c, n = counts
    low, high = tango_interval(b, c, n, confidence)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert tango_interval(c, b, n, confidence) == (-high, -low)
    wider = tango_interval(b, c, n, confidence + 0.005)
    assert wider[0] <= low
    assert high <= wider[1]

    low, high = tang_interval(both, b, c, n, confidence)
    assert 0 <= low <= high
    if both + c:
        assert low * (1 - 1e-8) <= (both + b) / (both + c) <= high * (1 + 1e-8)
    swapped = tang_interval(both, c, b, n, confidence)
    assert swapped == pytest.approx((1 / high if high else math.inf, 1 / low if low else math.inf))
    wider = tang_interval(both, b, c, n, confidence + 0.005)
    assert wider[0] <= low
    assert high <= wider[1]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(0.5, 0.99))
@settings(deadline=None)
def test_t_interval_holds_the_mean_mirrors_and_grows(values, confidence):
    low, high = mean_interval(values, confidence)
    assert low <= np.mean(values) <= high
    assert mean_interval([-value for value in values], confidence) == pytest.approx((-high, -low))
    wider = mean_interval(values, confidence + 0.005)
    assert wider[0] <= low
    assert high <= wider[1]
    watched = mean_interval(values, confidence, fewest=6)
    assert watched[1] - watched[0] >= (high - low) * (1 - 1e-9)
    assert geometric_mean_interval(values, confidence) == pytest.approx((math.exp(low), math.exp(high)))


def test_t_interval_of_too_few_is_infinite_and_says_so_in_json_as_null():
    assert mean_interval([], CONFIDENCE) == mean_interval([0.3], CONFIDENCE) == (-math.inf, math.inf)
    assert geometric_mean_interval([0.3], CONFIDENCE) == (0.0, math.inf)
    comparison = Comparison("a", "b", "latency", None, 1.2, "speedup", (0.0, math.inf), 1, details={"rounds": (1,)})
    assert comparison.to_json()["ci"] == [0.0, None]
    assert comparison.to_json()["details"] == {"rounds": [1]}


def test_sample_needed_is_the_sample_that_settles_it():
    n, b, c, limit = 500, 15, 20, -0.03
    ci = tango_interval(b, c, n, CONFIDENCE)
    assert ci[0] < limit < ci[1]
    needed = sample_needed(n, (b - c) / n, ci, limit)
    assert needed is not None
    times = needed / n
    enough = tango_interval(round(b * times * 1.1), round(c * times * 1.1), round(needed * 1.1), CONFIDENCE)
    few = tango_interval(round(b * times * 0.8), round(c * times * 0.8), round(needed * 0.8), CONFIDENCE)
    assert enough[0] > limit > few[0]
    assert sample_needed(n, limit, ci, limit) is None
    assert sample_needed(1, 0.1, (-math.inf, math.inf), 0.0) is None
    assert sample_needed(500, 0.1, (0.0, 0.2), 0.1 + 1e-9) is None, "more rows than anybody has"


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def classified(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, candidate's answers, other's answers), models that err alike."""
    generator = np.random.default_rng(seed)
    targets = np.minimum(generator.geometric(0.5, n) - 1, classes - 1)
    over = np.where(generator.random(n) < 0.8, targets, generator.integers(classes, size=n))
    candidate = np.where(generator.random(n) < 0.93, over, generator.integers(classes, size=n))
    return targets, candidate, over


@pytest.mark.parametrize("metric", [MACRO_F1, MATTHEWS], ids=lambda metric: metric.name)
@pytest.mark.parametrize("classes", [2, 5])
def test_cells_and_rows_give_the_same_bootstrap(metric, classes):
    targets, candidate, over = classified(700, classes)
    logits = [np.eye(classes)[answers] for answers in (candidate, over)]
    cells = resampling.resample_confusion(metric.from_confusion, [candidate, over], targets, resamples=4_000)
    rows = resampling.resample_rows(metric.compute, logits, targets, resamples=1_000)
    assert cells.point == pytest.approx(rows.point)
    assert cells.point == pytest.approx([metric.compute(answers, targets) for answers in logits])
    for contrast in ("value", "difference", "ratio"):
        a, b = cells.interval(contrast, CONFIDENCE), rows.interval(contrast, CONFIDENCE)
        assert a == pytest.approx(b, abs=0.12 * (b[1] - b[0]))


def test_bootstrap_mirrors_narrows_with_rows_and_knows_its_seed():
    targets, candidate, over = classified(2_000, 3)
    a, b = np.eye(3)[candidate], np.eye(3)[over]
    there, back = (compare_answers(MACRO_F1, *pair, targets, CONFIDENCE) for pair in ((a, b), (b, a)))
    assert there.estimate == -back.estimate
    assert there.ci[0] < there.estimate < there.ci[1]
    assert there.ci == pytest.approx((-back.ci[1], -back.ci[0]), abs=0.05 * (there.ci[1] - there.ci[0]))
    assert compare_answers(MACRO_F1, a, b, targets, CONFIDENCE) == there
    fewer = compare_answers(MACRO_F1, a[:200], b[:200], targets[:200], CONFIDENCE)
    assert fewer.ci[1] - fewer.ci[0] > 2 * (there.ci[1] - there.ci[0])
    wider = compare_answers(MACRO_F1, a, b, targets, 0.99)
    assert wider.ci[0] < there.ci[0] < there.ci[1] < wider.ci[1]


def test_degenerate_answers_are_told_apart_from_unknown_ones():
    targets, candidate, over = classified(200, 3)
    a, b = np.eye(3)[candidate], np.eye(3)[over]
    assert compare_answers(MACRO_F1, a, a, targets, CONFIDENCE).ci == (0.0, 0.0)
    assert compare_answers(MACRO_F1, a, a, targets, CONFIDENCE).details["ratio"] == {"estimate": 1, "ci": (1, 1)}

    undefined = Metric("undefined", True, "set", compute=lambda outputs, targets: math.nan)
    assert all(map(math.isnan, compare_answers(undefined, a, b, targets, CONFIDENCE).ci))

    hopeless = MATTHEWS.compute(np.eye(3)[np.roll(targets, 1)], targets)
    assert abs(hopeless) < 0.2
    ratio = compare_answers(MATTHEWS, a, np.eye(3)[np.roll(targets, 1)], targets, CONFIDENCE).details["ratio"]
    assert ratio["ci"] == (-math.inf, math.inf) or math.isnan(ratio["estimate"]), "no share of about nothing"


def test_a_handful_of_rows_has_no_bootstrap_interval():
    right, wrong = np.eye(2)[[0]], np.eye(2)[[1]]
    for metric in (MACRO_F1, MATTHEWS):
        found = compare_answers(metric, right, wrong, np.array([0]), CONFIDENCE)
        assert found.ci == (-math.inf, math.inf), "one row, drawn again, is always itself"
    targets, candidate, over = classified(resampling.FEWEST_ROWS, 3)
    few, enough = (
        compare_answers(MACRO_F1, np.eye(3)[candidate[:n]], np.eye(3)[over[:n]], targets[:n], CONFIDENCE).ci
        for n in (resampling.FEWEST_ROWS - 1, resampling.FEWEST_ROWS)
    )
    assert few == (-math.inf, math.inf)
    assert all(map(math.isfinite, enough))


def test_a_metric_that_fails_is_an_error_of_its_name():
    targets, candidate, over = classified(50, 3)
    picky = Metric("mine:picky", True, "set", compute=lambda outputs, targets: 1 / 0)
    with pytest.raises(EvaluationError, match="mine:picky can't be computed: ZeroDivisionError"):
        compare_answers(picky, np.eye(3)[candidate], np.eye(3)[over], targets, CONFIDENCE)
    with pytest.raises(EvaluationError, match="mine:picky"):
        score_answers(picky, np.eye(3)[candidate], targets, CONFIDENCE)


def test_one_model_is_scored_with_its_own_interval():
    targets, candidate, _ = classified(500, 3)
    a = np.eye(3)[candidate]
    hits = int((candidate == targets).sum())
    accuracy = score_answers(ACCURACY, a, targets, CONFIDENCE)
    assert (accuracy.estimate, accuracy.ci, accuracy.n) == (hits / 500, wilson_interval(hits, 500, CONFIDENCE), 500)
    f1 = score_answers(MACRO_F1, a, targets, CONFIDENCE)
    assert f1.ci[0] < f1.estimate < f1.ci[1] < f1.ci[0] + 0.2
    rows = Metric(
        "hits", True, "rows", compute=ACCURACY.compute, per_row=lambda out, y: (out.argmax(1) == y).astype(float)
    )
    assert score_answers(rows, a, targets, CONFIDENCE).ci == pytest.approx(accuracy.ci, abs=0.01)


# --- planted effects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 160), (40, 200), (300, 0), (25, 25)])
def test_planted_flips_are_found_exactly(gained, lost):
    over = np.arange(ROWS) % 5 > 0
    candidate = over.copy()
    candidate[np.flatnonzero(over)[:lost]] = False
    candidate[np.flatnonzero(~over)[:gained]] = True
    found = compare_hits(candidate, over, CONFIDENCE)
    assert found.estimate == (gained - lost) / ROWS
    assert found.n == ROWS
    assert found.details["flips"] == {"gained": gained, "lost": lost}
    assert found.details["mcnemar_p"] == mcnemar_exact(gained, lost)
    kept = found.details["ratio"]
    assert kept["estimate"] == candidate.sum() / over.sum()
    assert kept["ci"][0] < kept["estimate"] < kept["ci"][1]
    # For a model that is right in 80 %, a difference d is a share 1 + d / 0.8, and so are the ends, nearly.
    assert kept["ci"] == pytest.approx(tuple(1 + end / 0.8 for end in found.ci), abs=0.002)


# --- coverage, in short (benchmarks/intervals.py has it whole) --------------------------------------------------------


def test_score_intervals_cover_what_they_say():
    """Tango's summed over every likely outcome instead of simulated: no noise, so 90 +/- 1 holds. Tang's simulated."""
    n, gained, lost, both = 400, 0.04, 0.06, 0.78
    covered = weights = 0.0
    for flips in range(10, 75):
        for b in range(max(0, round(flips * 0.4) - 18), min(flips, round(flips * 0.4) + 18) + 1):
            weight = binom.pmf(flips, n, gained + lost) * binom.pmf(b, flips, gained / (gained + lost))
            if weight < 1e-5:
                continue
            c = flips - b
            low, high = tango_interval(b, c, n, CONFIDENCE)
            covered += weight * (low <= gained - lost <= high)
            weights += weight
    assert weights > 0.98
    assert 0.89 < covered / weights < 0.91

    generator = np.random.default_rng(0)
    held = 0
    for both_right, b, c, _ in generator.multinomial(n, [both, gained, lost, 1 - both - gained - lost], size=500):
        low, high = tang_interval(int(both_right), int(b), int(c), n, CONFIDENCE)
        held += low <= (both + gained) / (both + lost) <= high
    assert within_binomial_99(held, 500)
    assert held < 480


def test_bootstrap_covers_the_difference_of_macro_f1_and_of_means():
    table = np.random.default_rng(3).dirichlet(np.full(27, 0.3)).reshape(3, 3, 3) * 0.3
    table[[0, 1, 2], [0, 1, 2], [0, 1, 2]] += [0.4, 0.2, 0.1]
    truth = [MACRO_F1.from_confusion(1e9 * table.sum(axis=axis)) for axis in (2, 1)]
    generator = np.random.default_rng(0)
    held = {"f1": 0, "mean": 0}
    for seed in range(200):
        targets, a, b = np.unravel_index(generator.choice(27, size=600, p=table.ravel()), table.shape)
        low, high = resampling.resample_confusion(
            MACRO_F1.from_confusion, [a, b], targets, resamples=999, seed=seed
        ).interval("difference", CONFIDENCE)
        held["f1"] += low <= truth[0] - truth[1] <= high
        over = generator.exponential(1.0, 500)
        values = np.stack([over + generator.exponential(0.5, 500), over], axis=1)
        low, high = resampling.resample_means(values, resamples=499, seed=seed).interval("difference", CONFIDENCE)
        held["mean"] += low <= 0.5 <= high
    assert all(within_binomial_99(count, 200) and count < 195 for count in held.values()), held


@pytest.mark.parametrize("deviation", [0.01, 0.06])
def test_t_interval_covers_when_rounds_end_as_soon_as_it_is_narrow(deviation):
    held = 0
    for ratios in np.random.default_rng(0).normal(0.0, deviation, (500, 40)):
        for n in range(6, 41):
            low, high = mean_interval(ratios[:n], CONFIDENCE, fewest=6)
            if high - low <= 0.06:
                break
        held += low <= 0 <= high
    assert within_binomial_99(held, 500)
    assert held < 480
