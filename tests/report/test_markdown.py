"""The comment: its order, its claims, and how it is cut to a host's limit."""

from __future__ import annotations

import copy
import math
import random
import re
from typing import Any

import pytest
from ci_examples import EXAMPLES, SETTINGS, failing, inconclusive, passing, selected, stage_error
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from scipy import stats

from optimize.report.checks import BETTER, WORSE, checks, count_claims, others, place_of
from optimize.report.checks import _quantile as quantile
from optimize.report.github import SUMMARY_BYTES, step_summary
from optimize.report.markdown import GITHUB_LIMIT, comment, marker

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table"])


def test_the_smallest_margin_comes_first() -> None:
    for make in (passing, failing, selected):
        shares = [one.gate["margin"] / next(iter(one.gate["limit"].values())) for one in checks(make())]
        assert shares == sorted(shares)
    assert [one.outcome for one in checks(failing())][:2] == ["fail", "acknowledged"]


def test_the_table_has_exactly_what_decides() -> None:
    document = selected()
    assert len(checks(document)) == len(document["confirmation"]["gates"])
    assert {one.gate["artifact"] for one in others(document)} == {"int8", "openvino"}
    table = comment(document).partition("<details>")[0]
    assert table.count("\n| ") == 2 + len(checks(document))
    assert "openvino" not in table


def test_values_are_the_artifact_s_own() -> None:
    assert {one.what: one.value for one in checks(passing())} == {
        "accuracy of int8 over teacher": "0.8082",
        f"latency of int8 over onnx at {SETTINGS[0].replace(',', ', ')}": "7.98 ms",
        f"latency of int8 over onnx at {SETTINGS[1].replace(',', ', ')}": "63.84 ms",
        "size of int8 over teacher": "23.7 MB",
    }


def claims(estimate: float, low: float | None, high: float | None, limit: str = "max_drop", **more: Any) -> str:
    """Of one gate alone."""
    document = passing()
    one = document["gates"][0]
    one.update(limit={limit: 0.5}, estimate=estimate, ci=[low, high], **more)
    document["gates"] = [one]
    for key in ("n", "estimate"):
        document["comparisons"][0][key] = {"n": 2560, "estimate": estimate}[key]
    (found,) = checks(document)
    assert count_claims(document) == bool(found.claim)
    return found.claim


@pytest.mark.parametrize(
    ("limit", "estimate", "low", "high", "said"),
    [
        ("max_drop", 0.03, 0.02, 0.04, BETTER),
        ("max_drop", -0.03, -0.04, -0.02, WORSE),
        ("max_drop", 0.03, -0.001, 0.06, ""),
        ("max_increase", 0.03, 0.02, 0.04, WORSE),
        ("max_increase", -0.03, -0.04, -0.02, BETTER),
        ("min_ratio", 1.3, 1.2, 1.4, BETTER),
        ("max_ratio", 1.3, 1.2, 1.4, WORSE),
        ("max_ratio", 0.7, 0.6, 0.8, BETTER),
        ("min_speedup", 0.7, 0.6, 0.8, WORSE),
        ("max_ratio", 1.0, 1.0, 1.0, ""),
        ("max_ratio", 0.999, 0.999, 0.999, BETTER),
        ("max_drop", 0.0, 0.0, 0.0, ""),
        ("max_drop", 0.03, None, 0.04, ""),
        ("min", 0.9, 0.8, 0.95, ""),
        ("min_ratio", 0.0, -0.1, 0.2, ""),
    ],
)
def test_better_and_worse_follow_the_direction(limit: str, estimate: float, low: Any, high: Any, said: str) -> None:
    assert claims(estimate, low, high, limit) == said


def test_equal_bytes_are_neither() -> None:
    assert claims(-0.03, -0.04, -0.02) == WORSE
    document = passing()
    document["gates"][0].update(estimate=-0.03, ci=[-0.04, -0.02], over="int8")
    assert [one.claim for one in checks(document) if one.gate["over"] == "int8"] == [""]


def test_a_time_must_differ_by_more_than_the_baseline_from_itself() -> None:
    document = passing()
    slow = document["gates"][1]
    slow.update(estimate=1.03, ci=[1.025, 1.035])
    (before,) = (one.claim for one in checks(document) if one.gate is slow)
    document["measurement"]["control"][SETTINGS[0]] = {"estimate": 0.0, "ci": [-0.05, 0.05]}
    (after,) = (one.claim for one in checks(document) if one.gate is slow)
    assert (before, after) == (BETTER, "")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-0.5, 0.5), st.floats(0, 0.3), st.floats(0, 0.3), st.sampled_from(["accuracy", "peak_memory"])
        ),
        min_size=1,
        max_size=6,
    )
)
def test_claims_are_made_only_where_the_interval_shown_excludes_no_change(found: list[Any]) -> None:
    document = passing()
    (template, *_) = document["gates"]
    document["gates"] = [
        {**copy.deepcopy(template), "metric": metric, "estimate": middle, "ci": [middle - below, middle + above]}
        for middle, below, above, metric in found
    ]
    for one in checks(document):
        low, high = one.gate["ci"]
        assert not one.claim or not low <= 0 <= high
    assert comment(document).partition("<details>")[0].count(" better") == sum(
        one.claim == BETTER for one in checks(document)
    )


def test_a_candidate_that_differs_in_nothing_is_called_better_or_worse_once_in_twenty() -> None:
    """Three gated quantities of 8 rounds each, drawn without any difference; 1,500 comments."""
    rng, wrong, runs, rounds = random.Random(3), 0, 1_500, 8
    quantum = float(stats.t.ppf(0.95, rounds - 1))
    document = passing()
    template = {**document["gates"][0], "metric": "peak_memory", "limit": {"max_ratio": 1.1}}
    for _ in range(runs):
        document["gates"], document["comparisons"] = [], []
        for number in range(3):
            draws = [rng.gauss(0, 0.01) for _ in range(rounds)]
            mean = sum(draws) / rounds
            half = quantum * math.sqrt(sum((x - mean) ** 2 for x in draws) / (rounds - 1) / rounds)
            one = {**template, "setting": str(number), "estimate": math.exp(mean), "margin": 0.1}
            one["ci"] = [math.exp(mean - half), math.exp(mean + half)]
            document["gates"].append(one)
            document["comparisons"].append({**one, "n": rounds})
        wrong += count_claims(document) > 0
    # 5 % at the most by design; nearly that, since the three are independent.
    assert stats.binom.ppf(0.001, runs, 0.04) < wrong < stats.binom.ppf(0.999, runs, 0.05)


@pytest.mark.parametrize("share", [0.95, 0.975, 0.995, 0.9995])
@pytest.mark.parametrize("freedom", [3, 5, 7, 30, math.inf])
def test_quantiles_of_student_s_t(share: float, freedom: float) -> None:
    exact = stats.norm.ppf(share) if math.isinf(freedom) else stats.t.ppf(share, freedom)
    assert quantile(share, freedom) == pytest.approx(exact, rel=0.01 if freedom > 4 or share < 0.99 else 0.3)


def crowded(gates: int, text: str) -> dict[str, Any]:
    document = failing()
    template = document["gates"][0]
    document["gates"] = [{**template, "setting": f"batch_size={n}", "reason": text} for n in range(gates)]
    document["against"]["changed"]["recipe"] *= gates
    return document


@pytest.mark.parametrize("gates", [1, 300])
@pytest.mark.parametrize("limit", [500, 4_000, 20_000, GITHUB_LIMIT])
def test_it_is_cut_without_losing_the_verdict(gates: int, limit: int) -> None:
    document = crowded(gates, "it is | not <met> & more " * 40)
    text = comment(document, limit=limit)
    assert len(text) <= limit
    assert text.startswith("### ❌ FAIL")
    assert text.endswith(f"{marker(document)}\n")
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>") == text.count("</summary>")
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")
    for token in PARSER.parse(text):
        # A table is whole: every row has the cells of the header, and no line of one became a paragraph.
        assert not (token.type == "inline" and token.content.startswith("|"))
    if gates == 300:
        shown = len(re.findall(r"^\| ❌", text, re.MULTILINE))
        left_out = re.search(r"_([\d,]+) more left out", text)
        if limit > 500 and shown < gates:
            assert left_out is not None
            assert shown + int(left_out[1].replace(",", "")) == gates


def test_a_summary_counts_bytes_and_what_is_there_already() -> None:
    document = crowded(900, "ü" * 400)
    assert len(step_summary(document, used=1_000).encode()) < SUMMARY_BYTES - 1_000
    assert len(step_summary(document, used=SUMMARY_BYTES - 4_000).encode()) < 4_000


def test_what_changed_is_said_or_that_nothing_is_promoted() -> None:
    text = comment(failing())
    assert "| recipe | `stages.int8.mode` | `static` | `dynamic` |" in text
    assert "| environment | `onnxruntime` | `1.30.0` | `1.31.1` |" in text
    assert "Nothing is promoted as `sentiment@production` yet" in comment(inconclusive())
    document = failing()
    document["against"]["changed"] = {}
    assert "are the same as then" in comment(document)


def test_an_acknowledged_regression_is_marked_with_reason_and_expiry() -> None:
    (line,) = (line for line in comment(failing()).splitlines() if line.startswith("- 📌") and "until" in line)
    for part in ("size of int8", "until 2026-12-31", "`acknowledged.yaml:3:3`", "brings its own merges"):
        assert part in line


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_first_line_says_the_verdict(name: str) -> None:
    document = {"error": None, **EXAMPLES[name]()}
    said = "ERROR" if document["error"] else str(document["verdict"]).upper()
    assert said in comment(document).splitlines()[0]


def test_no_gate_no_verdict() -> None:
    document = {**passing(), "gates": [], "verdict": None, "promoted": None}
    assert comment(document).startswith("### ➖ NO VERDICT · `sentiment`\n")


def test_places() -> None:
    assert place_of("a b:c.yaml:3:14") == ("a b:c.yaml", 3, 14)
    for nothing in (None, "", "recipe.yaml", "x:1", ":1:2", "a:b:1", "a:1:99999999999"):
        assert place_of(nothing) is None
    assert "recipes/sentiment.yaml:22:5" in comment(stage_error())
