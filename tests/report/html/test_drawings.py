from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import made_run

from optimize.report.html import distributions, gates, heatmap, history, lineage, pareto, rows, tail, waterfall
from optimize.report.html.forest import Entry
from optimize.report.html.forest import draw as draw_forest
from optimize.report.html.pareto import Line, Point
from optimize.report.html.reading import Result
from optimize.report.html.svg import WIDTH

number = st.floats(0.01, 1e4)
unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def result(tmp_path: Path) -> Result:
    return Result(made_run(tmp_path), tmp_path)


def inside(drawn: object) -> ET.Element:
    """The picture, once every mark of it was found to lie in its frame."""
    picture = ET.fromstring(str(drawn))
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    assert width == WIDTH
    for element in picture.iter():
        for name, most in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("cy", height)):
            if name in element.attrib:
                assert -0.01 <= float(element.attrib[name]) <= most + 0.01, (element.tag, element.attrib)
    return picture


@unhurried
@given(low=number, width=number, limit=number, side=st.sampled_from([1, -1]))
def test_a_gates_picture_holds_interval_and_limit(low: float, width: float, limit: float, side: int) -> None:
    ci = (low, low + width)
    scale = gates.gate_scale(low + width / 2, ci, limit)
    assert scale.start < scale(limit) < scale.end
    assert scale.start < scale(ci[0]) <= scale(ci[1]) < scale.end
    picture = inside(gates.draw_gate("g", low + width / 2, ci, limit, side, "pass"))
    allowed = next(one for one in picture.iter("rect") if one.attrib["class"] == "allowed")
    left = float(allowed.attrib["x"])
    right = left + float(allowed.attrib["width"])
    good = scale(limit + side * 1e9)
    assert left - 0.02 <= good <= right + 0.02
    assert abs((left if side > 0 else right) - scale(limit)) < 0.02


def test_the_worst_gate_comes_first() -> None:
    def gate(verdict: str, margin: float) -> dict[str, Any]:
        return {
            "metric": "accuracy", "artifact": "a", "over": "b", "setting": None, "limit": {"max_drop": 0.02},
            "estimate": 0.0, "ci": [-0.01, 0.01], "margin": margin, "verdict": verdict, "reason": verdict,
        }  # fmt: skip

    made = [gate("pass", 0.01), gate("inconclusive", 0.0), gate("pass", 0.002), gate("fail", -0.01)]
    document: Any = {"gates": made}
    told = [(row["verdict"], row["margin"]) for row in gates.gate_rows(Result(document))]
    assert told == [("fail", "−0.010"), ("inconclusive", "+0.000"), ("pass", "+0.002"), ("pass", "+0.010")]


def test_a_drop_is_drawn_as_a_limit_below_nothing(result: Result) -> None:
    row = next(row for row in gates.gate_rows(result) if row["limit_name"] == "max_drop")
    assert row["limit"] == "at least −0.020"


# --- the trade --------------------------------------------------------------------------------------------------------


@unhurried
@given(
    st.lists(st.tuples(number, st.floats(0, 1), number, st.floats(0, 0.5), st.floats(0, 0.2)), min_size=1, max_size=11),
    st.lists(st.tuples(st.booleans(), number), max_size=3),
)
def test_points_bars_and_gates_lie_in_the_frame(
    values: list[tuple[float, ...]], limits: list[tuple[bool, float]]
) -> None:
    points = [Point("base", 10, 0.5, 1e6, None, None)]
    for i, (x, y, size, dx, dy) in enumerate(values):
        points.append(Point(f"p{i}", x, y, size, (x * (1 - dx), x * (1 + dx)), (y - dy, y + dy)))
    lines = [Line(vertical, at if vertical else at / 1e4, "limit") for vertical, at in limits]
    across, up = pareto.scales(points, lines)
    for point in points:
        assert across.holds(point.x)
        assert up.holds(point.y)
        for low, high in (point.x_ci or (point.x, point.x),):
            assert low is not None
            assert high is not None
            assert across(low) <= across(point.x) <= across(high)
    picture = inside(pareto.draw("p", points, lines, "accuracy", "latency"))
    names = [t.text for t in picture.iter("text") if t.attrib.get("class") == "name"]
    assert sorted(filter(None, names)) == sorted(point.name for point in points)


def test_dominance_is_claimed_where_intervals_lie_apart_and_nowhere_else(tmp_path: Path) -> None:
    document = made_run(tmp_path, candidates=2)
    worse, better = "candidate-0", "candidate-1"
    result = Result(document)
    # Faster and smaller, and of an accuracy that can't be told from the other's: no claim.
    assert pareto.dominated_by(result, worse, "accuracy") is None
    direct = [one for one in document["comparisons"] if (one["artifact"], one["over"]) == (better, worse)]
    quality = next(one for one in direct if one["metric"] == "accuracy")
    quality |= {"estimate": 0.01, "ci": [0.002, 0.018]}
    assert pareto.dominated_by(result, worse, "accuracy") == better
    assert pareto.dominated_by(result, better, "accuracy") is None
    speed = next(one for one in direct if one["metric"] == "latency")
    kept = dict(speed)
    speed |= {"ci": [0.99, 1.4]}
    assert pareto.dominated_by(result, worse, "accuracy") is None
    speed |= kept
    # Without a comparison of the two, their intervals over the baseline have to lie apart.
    document["comparisons"] = [one for one in document["comparisons"] if one["over"] == "teacher"]
    assert pareto.dominated_by(result, worse, "accuracy") is None
    ours = next(one for one in document["comparisons"] if (one["artifact"], one["metric"]) == (better, "accuracy"))
    ours |= {"estimate": 0.05, "ci": [0.04, 0.06]}
    assert pareto.dominated_by(result, worse, "accuracy") == better
    result.artifact(better)["size_bytes"] = 10**12  # type: ignore[index]
    assert pareto.dominated_by(result, worse, "accuracy") is None


def test_gates_become_lines_in_the_units_of_the_picture(result: Result) -> None:
    phase, setting = result.times[0]
    points = pareto.find_points(result, "accuracy", phase, setting)
    lines = pareto.gate_lines(result, points, "accuracy", phase, setting)
    assert {(one.vertical, round(one.at, 4)) for one in lines} == {(False, 0.88), (True, round(40 / 1.2, 4))}


# --- the chain --------------------------------------------------------------------------------------------------------


def test_forks_are_branches_and_every_artifact_stands_once(result: Result) -> None:
    found = waterfall.tree(result)
    assert found == [("teacher", 0), ("candidate-0", 0), ("candidate-1", 1), ("candidate-2", 1)]
    assert [one["name"] for one in lineage.lineage(result)] == [name for name, _ in found]


def test_a_step_is_called_better_only_where_the_interval_says_so(result: Result) -> None:
    trends = {step.name: step.trend for step in waterfall.find_steps(result, "accuracy", None)}
    assert trends == {"teacher": "start", "candidate-0": "unclear", "candidate-1": "unclear", "candidate-2": "unclear"}
    assert waterfall.find_steps(result, *result.times[0])[1].trend == "better"
    assert [step.trend for step in waterfall.find_steps(result, "size", None)][1:] == ["better"] * 3


def test_bars_lead_from_the_parent_to_the_artifact(result: Result) -> None:
    steps = waterfall.find_steps(result, "size", None)
    assert [step.before for step in steps][1:] == [steps[0].value, steps[1].value, steps[1].value]
    for one in waterfall.waterfalls(result):
        inside(one["picture"])


def test_a_loop_of_parents_ends(result: Result) -> None:
    result.document["artifacts"][0]["parent"] = result.document["artifacts"][1]["digest"]
    assert sorted(name for name, _ in waterfall.tree(result)) == sorted(result.names)


# --- times ------------------------------------------------------------------------------------------------------------


def test_the_control_stands_beside_the_baseline(result: Result) -> None:
    samples = result.sidecar("samples")
    series = distributions.find_series(result, samples, samples["settings"][0]["setting"])
    assert [one.name for one in series][:2] == ["teacher", "teacher again (A/A)"]
    assert [one.control for one in series].count(True) == 1
    assert len(series) == 5
    for one in distributions.distributions(result):
        inside(one["picture"])
        assert one["control"] == "1.00× [1.00×, 1.01×]"


def test_a_ridge_is_dense_where_calls_are() -> None:
    # Half of the calls within 1 ms, the other half over the next 99.
    quantiles = [1 + i / 100 for i in range(101)] + [2 + i * 0.99 for i in range(100)]
    series = distributions.Series("a", quantiles, [1.5], 1000)
    scale = distributions.scale_of(quantiles, 0, 100)
    found = distributions.density(series, scale)
    peak = max(found, key=lambda point: point[1])
    assert peak[0] < 12
    assert peak[1] == 1
    assert all(0 <= height <= 1 for _, height in found)


def test_few_calls_say_no_99_percent() -> None:
    def table(samples: int) -> list[str]:
        return distributions._table_row(distributions.Series("a", list(range(1, 202)), [1.0], samples))

    assert table(298)[4] == ""
    assert table(299)[4] != ""


# --- tail, layers, rows -----------------------------------------------------------------------------------------------


def test_the_tail_rises_from_the_median_to_the_largest(result: Result) -> None:
    (one,) = tail.tails(result)
    inside(one["picture"])
    for found in tail.find_tails(result, "kl"):
        values = [value for _, _, value in found.points]
        assert len(values) == 4
        assert values == sorted(values)
        assert len({shape for _, shape, _ in found.points}) == 4


def test_layers_with_a_number_become_a_grid() -> None:
    layers = {f"model.layers.{i}.{kind}": float(i) for i in range(4) for kind in ("attn.q", "mlp.up")}
    grid = heatmap.grid_of(layers)
    assert grid.rows == ["0", "1", "2", "3"]
    assert grid.columns == ["attn.q", "mlp.up"]
    assert grid.values == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


@unhurried
@given(
    st.dictionaries(st.text(min_size=1, max_size=12), st.one_of(st.none(), st.floats(0, 1e6)), min_size=1, max_size=40)
)
def test_any_layers_become_a_grid_that_holds_each(layers: dict[str, float | None]) -> None:
    grid = heatmap.grid_of(layers)
    held = sorted(value for row in grid.values for value in row if value is not None)
    assert held == sorted(value for value in layers.values() if value is not None)
    inside(heatmap.draw("h", "title", grid, held))


@unhurried
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_larger_values_are_never_drawn_as_smaller(values: list[float]) -> None:
    level = heatmap.levels(values)
    found = [level(value) for value in sorted(values)]
    assert found == sorted(found)
    assert all(0 <= one < heatmap.STEPS for one in found)


@pytest.mark.parametrize(
    ("label", "before", "now", "kind"),
    [("a", "a", "b", "lost"), ("a", "b", "a", "gained"), ("a", "b", "c", "other"), (None, "a", "b", "other")],
)
def test_what_a_change_did(label: str | None, before: str, now: str, kind: str) -> None:
    assert rows.kind_of(label, before, now) == kind


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"label": "good", "score": 0.8312}, ("good", "0.831")),
        ({"perplexity": 87.2, "tokens": 63}, ("perplexity 87.2, tokens 63", "")),
        (["violent", "##d"], ("violent ##d", "")),
        ({"text": "un film"}, ("un film", "")),
        ("plain", ("plain", "")),
        (None, ("none", "")),
    ],
)
def test_answers_of_every_task_have_words(given_: Any, said: tuple[str, str]) -> None:
    assert rows.answer(given_) == said


@unhurried
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_a_forest_stays_in_its_frame(values: list[tuple[float, float]]) -> None:
    entries = [Entry(f"e{i}", at, (at - half, None if i == 1 else at + half)) for i, (at, half) in enumerate(values)]
    inside(draw_forest("f", "accuracy", entries, 0.0, "difference"))


def test_a_history_joins_times_of_one_host_only(tmp_path: Path) -> None:
    results = [Result(made_run(tmp_path / run, run=run), tmp_path / run) for run in ("r1", "r2", "r3")]
    results[2].document["host"]["cpu"]["model"] = "another"
    at = results[0].times[0]
    moments = history.find_moments(results, ["A", "B", "C"], *at)
    assert [moment.joins for moment in moments] == [False, True, False]
    assert [moment.joins for moment in history.find_moments(results, ["A", "B", "C"], "accuracy", None)][1:] == [
        True
    ] * 2
    for one in history.charts(results, ["A", "B", "C"]):
        inside(one["picture"])
