"""What is told of the differences between two runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.gating.changes import MAX_TEXT, MOST, changed

RECIPE = {
    "name": "m",
    "stages": [{"quantize": "int8", "name": "int8", "mode": "dynamic"}],
    "gates": [],
    "promote": None,
}
DOCUMENT: dict[str, Any] = {
    "data": {"evaluation": {"digest": "sha256:a", "rows": 10}},
    "host": {"cpu": {"model": "x"}, "libraries": {"torch": "2.0"}, "python": "3.11", "os": "Linux", "memory_bytes": 1},
}


def told(before: Any, recipe_before: Any, recipe: Any = None) -> Any:
    normal: Any = SimpleNamespace(document=lambda: recipe or RECIPE)
    return changed(DOCUMENT, normal, before, recipe_before)


def test_nothing_changed() -> None:
    none: dict[str, Any] = {"recipe": [], "data": [], "environment": [], "host": []}
    assert told(DOCUMENT, {"recipe": RECIPE}) == none


def test_each_kind() -> None:
    before = {
        "data": {"evaluation": {"digest": "sha256:b", "rows": 10}},
        "host": {**DOCUMENT["host"], "libraries": {"torch": "1.9", "gone": "1"}, "cpu": {"model": "y"}},
    }
    old = {**RECIPE, "stages": [{"quantize": "int8", "name": "int8", "mode": "static"}]}
    assert told(before, {"recipe": old}) == {
        "recipe": [{"what": "stages.int8.mode", "before": "static", "after": "dynamic"}],
        "data": [{"what": "data.evaluation.digest", "before": "sha256:b", "after": "sha256:a"}],
        "environment": [
            {"what": "libraries.torch", "before": "1.9", "after": "2.0"},
            {"what": "libraries.gone", "before": "1", "after": None},
        ],
        "host": [{"what": "cpu.model", "before": "y", "after": "x"}],
    }


def test_one_more_stage_is_one_change() -> None:
    old = {**RECIPE, "stages": [{"export": "onnx", "name": "onnx"}, *RECIPE["stages"]]}
    (change,) = told(None, {"recipe": old})["recipe"]
    assert (change["what"], change["after"]) == ("stages.onnx", None)


def test_gates_go_by_their_metric() -> None:
    size = {"metric": "size", "max_ratio": 0.5}
    old = {**RECIPE, "gates": [size, {"metric": "accuracy", "max_drop": 0.02}]}
    new = {**RECIPE, "gates": [{"metric": "accuracy", "max_drop": 0.01}, size, {**size, "on": "int8"}]}
    assert told(None, {"recipe": old}, new)["recipe"] == [
        {"what": "gates.accuracy.max_drop", "before": 0.02, "after": 0.01},
        {"what": "gates.size[1]", "before": None, "after": {"max_ratio": 0.5, "on": "int8"}},
    ]


def test_what_is_not_known_is_left_out() -> None:
    assert told(None, None) == {}
    assert told([], "nonsense") == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(JSON, JSON)
def test_anything_that_a_remote_may_tell(before: Any, recipe: Any) -> None:
    found = told({"data": before, "host": before}, {"recipe": recipe})
    for changes in found.values():
        assert len(changes) <= MOST + 10
        assert all(one["before"] != one["after"] for one in changes)


def test_long_values_are_cut() -> None:
    found = told(None, {"recipe": {**RECIPE, "name": "x" * 10_000}})
    assert len(found["recipe"][0]["before"]) == MAX_TEXT
