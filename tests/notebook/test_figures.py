"""What the pictures say: places, intervals, limits and dominance, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from results import BATCH_1, NASTY

from optimize.errors import OptimizeError
from optimize.notebook import figures


def test_intervals_lie_around_an_artifacts_own_value(document: dict[str, Any]) -> None:
    found = {point.name: point for point in figures.pareto(document).points}
    assert found["teacher"].quality_ci == (0.8, 0.8)  # what the others are held against
    assert found["teacher"].ms_ci == pytest.approx((20 * math.exp(-0.01), 20 * math.exp(0.02)))
    assert found[NASTY].quality_ci == pytest.approx((0.77, 0.81))
    assert found[NASTY].ms_ci == pytest.approx((5 * 4 / 5, 5 * 4 / 3.2))
    assert found[NASTY].verdict == "inconclusive"


def test_gates_lie_where_they_decide(document: dict[str, Any]) -> None:
    found = figures.pareto(document)
    assert found.quality_limits == {"max_drop 0.02 over teacher": pytest.approx(0.78)}
    assert found.ms_limits == {"min_speedup 1.6 over onnx": 10.0}


def test_dominance_needs_intervals_that_show_it(document: dict[str, Any]) -> None:
    """`onnx` is certainly less accurate and slower than `int8`, and larger; `teacher` may be more accurate."""
    found = {point.name: point.dominated_by for point in figures.pareto(document).points}
    assert found == {"teacher": None, "onnx": NASTY, NASTY: None}
    document["comparisons"][0]["ci"] = [-0.3, -0.02]  # now it could be as accurate
    assert all(point.dominated_by is None for point in figures.pareto(document).points)


def test_what_less_is_better_of_is_dominated_from_the_other_side(document: dict[str, Any]) -> None:
    for part in (*document["comparisons"], *document["gates"]):
        part["metric"] = "perplexity" if part["metric"] == "accuracy" else part["metric"]
    for one in document["artifacts"]:
        one["scores"]["perplexity"] = one["scores"].pop("accuracy")
    found = figures.pareto(document)
    assert found.less_is_better
    assert {point.name: point.dominated_by for point in found.points} == {"teacher": "onnx", "onnx": None, NASTY: None}


@pytest.mark.parametrize("options", [{"metric": "f1"}, {"setting": "batch_size=2"}])
def test_what_was_not_measured_is_named(document: dict[str, Any], options: dict[str, str]) -> None:
    with pytest.raises(OptimizeError, match="this run has no") as caught:
        figures.pareto(document, **options)
    assert BATCH_1 in str(caught.value.hint)


def test_every_comparison_is_a_line(document: dict[str, Any]) -> None:
    panels = figures.intervals(document)
    assert [panel.title for panel in panels] == ["accuracy", "latency, batch 1", "latency, batch 8"]
    assert [len(panel.lines) for panel in panels] == [2, 3, 2]
    accuracy, batch_1, batch_8 = panels
    assert (accuracy.no_change, batch_1.no_change) == (0, 1)
    assert accuracy.lines[1].limit == -0.02
    assert batch_1.lines[2].limit == 1.6
    assert batch_8.lines[1].ci == (1.5, 3.5)  # the end that nothing bounds
    assert [panel.title for panel in figures.intervals(document, metric="size")] == ["size"]


def test_a_ratio_that_a_gate_judges_is_what_is_drawn(document: dict[str, Any]) -> None:
    document["comparisons"][4]["details"] = {"ratio": {"estimate": 0.99, "ci": [0.96, 1.01]}}
    document["gates"][0]["limit"] = {"min_ratio": 0.97}
    line = figures.intervals(document, metric="accuracy")[0].lines[1]
    assert (line.estimate, line.ci, line.limit) == (0.99, (0.96, 1.01), 0.97)


def test_a_chain_is_the_way_to_an_artifact(document: dict[str, Any]) -> None:
    found = figures.waterfall(document)
    assert found.artifact == NASTY
    steps = found.measures["accuracy"]
    assert [(step.name, step.before, step.after) for step in steps] == [
        ("teacher", None, 0.8),
        ("onnx", 0.8, 0.7),
        (NASTY, 0.7, 0.79),
    ]
    assert steps[0].ci is None
    assert steps[2].ci == pytest.approx((0.77, 0.81))
    assert list(found.measures) == ["accuracy", "latency, batch 1 (ms)", "latency, batch 8 (ms)", "size (MB)"]
    assert [step.name for step in figures.waterfall(document, "onnx").measures["accuracy"]] == ["teacher", "onnx"]
    with pytest.raises(OptimizeError, match="no artifact 'nothing'"):
        figures.waterfall(document, "nothing")


def test_tables_of_layers() -> None:
    rows = [{"name": "a", "error": 0.1, "rtn_error": 0.3}, {"name": "b", "error": None, "rtn_error": None}]
    found = figures.layers({"layers": rows}, "gptq")
    assert (found.names, found.values, found.reference) == (["a"], [0.1], [0.3])
    sensitivity = {"layers": {"x": 0.2, "y": 0.1}, "distance": "kl"}
    found = figures.layers({"sensitivity": sensitivity, "kept": ["x"]}, "int8")
    assert (found.measure, found.values, found.kept) == ("kl", [0.2, 0.1], {"x"})
    assert figures.layers({"relative_error": {"layers": {"x": 0.2}}}, "nf4").values == [0.2]
    with pytest.raises(OptimizeError, match="no table of layers"):
        figures.layers({"dtype": "bfloat16"}, "cast")


def test_a_stack_of_blocks_is_told_from_its_names() -> None:
    names = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    found = figures.kinds_and_blocks(names)
    assert found == {"self_attn.q_proj": [(0, 0), (1, 2), (2, 4)], "mlp.up_proj": [(0, 1), (1, 3), (2, 5)]}
    assert figures.kinds_and_blocks(["lm_head"]) is None
