"""Which of a recipe's gates are judged over what is promoted, and with which limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimize.errors import RecipeError
from optimize.gating.limits import asks_for_improvement, gates_over
from optimize.recipe import Gate, Recipe, load


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,b\n")
    return {
        "version": 1,
        "name": "m",
        "model": {"source": str(model), "task": "text-classification"},
        "data": {"source": str(rows)},
        "stages": [{"distill": "finetune", "name": "teacher"}, {"export": "onnx"}, {"quantize": "int8"}],
        "baseline": "teacher",
        "gates": [],
    }


def judged(document: dict[str, Any], *gates: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    recipe: Recipe = load({**document, "gates": list(gates), **more}, env=False)
    found = gates_over(recipe, ["production", "production~5"])
    return [gate.model_dump(exclude_none=True, exclude_defaults=True) for gate in found]


def over_both(gate: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**gate, "over": name} for name in ("production", "production~5")]


@pytest.mark.parametrize(
    "gate",
    [
        {"metric": "accuracy", "max_drop": 0.02},
        {"metric": "accuracy", "max_drop": 0.0},
        {"metric": "accuracy", "min_ratio": 0.98},
        {"metric": "latency", "min_speedup": 0.95},
        {"metric": "size", "max_ratio": 1.0},  # exact: the same size keeps it
        {"metric": "size", "max_ratio": 1.02},
    ],
)
def test_what_an_unchanged_model_keeps_is_asked_over_the_promoted_one(
    gate: dict[str, Any], document: dict[str, Any]
) -> None:
    assert judged(document, gate) == over_both(gate)


@pytest.mark.parametrize(
    ("gate", "tolerated"),
    [
        ({"metric": "latency", "min_speedup": 1.5}, {"min_speedup": 0.95}),
        ({"metric": "latency", "min_speedup": 1.0}, {"min_speedup": 0.95}),
        ({"metric": "latency", "min_speedup": 1.5, "over": "onnx"}, {"min_speedup": 0.95}),
        ({"metric": "size", "max_ratio": 0.35}, {"max_ratio": 1.02}),
        ({"metric": "peak_memory", "max_ratio": 1.0}, {"max_ratio": 1.05}),
        ({"metric": "accuracy", "min_ratio": 1.0}, {"min_ratio": 0.99}),
    ],
)
def test_an_improvement_is_asked_where_it_was_and_kept_over_the_promoted_one(
    gate: dict[str, Any], tolerated: dict[str, Any], document: dict[str, Any]
) -> None:
    assert judged(document, gate) == [*over_both({"metric": gate["metric"], **tolerated}), gate]


@pytest.mark.parametrize(
    "gate",
    [
        {"metric": "latency", "max_ms": 20.0},
        {"metric": "accuracy", "min": 0.8},
        {"metric": "accuracy", "max_drop": 0.02, "over": "teacher"},
        {"metric": "accuracy", "max_drop": 0.02, "on": "onnx"},  # the middle of the chain was never promoted
    ],
)
def test_what_stays_as_it_is(gate: dict[str, Any], document: dict[str, Any]) -> None:
    assert judged(document, gate) == [gate]


def test_a_gate_on_the_end_and_on_the_middle_is_both(document: dict[str, Any]) -> None:
    gate = {"metric": "accuracy", "max_drop": 0.02, "on": ("onnx", "int8")}
    assert judged(document, gate) == [*over_both({**gate, "on": ("int8",)}), {**gate, "on": ("onnx",)}]


def test_a_limit_of_its_own_is_not_doubled(document: dict[str, Any]) -> None:
    own = {"metric": "latency", "min_speedup": 0.9}
    better = {"metric": "latency", "min_speedup": 1.5, "over": "onnx"}
    assert judged(document, own, better) == [*over_both(own), better]


def test_a_block_says_it_all(document: dict[str, Any]) -> None:
    own = {"metric": "accuracy", "max_drop": 0.02}
    asked = {"metric": "accuracy", "max_drop": 0.005}
    absolute = {"metric": "latency", "max_ms": 20.0}
    found = judged(document, own, against={"gates": [asked, absolute]})
    assert found == [*over_both(asked), own, absolute]


def test_every_default_is_a_gate_that_something_unchanged_keeps() -> None:
    from optimize.gating.limits import TOLERATED

    for metric, (limit, value) in TOLERATED.items():
        assert not asks_for_improvement(Gate.model_validate({"metric": metric, limit: value}))


def test_the_block_changes_no_digest_of_recipes_without_one(document: dict[str, Any]) -> None:
    plain = load(document, env=False)
    assert "against" not in plain.document()
    with_block = load({**document, "against": {"gates": [{"metric": "size", "max_ratio": 1.02}]}}, env=False)
    assert with_block.digest != plain.digest
    assert load(with_block.document(), env=False).digest == with_block.digest
    assert with_block.against[0].limit == ("max_ratio", 1.02)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"gates": []}, "1 or more"),
        ({"gate": []}, "did you mean `gates`"),
        ({}, "`gates` is missing"),
        ({"gates": [{"metric": "acuracy", "max_drop": 1.0}]}, "did you mean `accuracy`"),
        ({"gates": [{"metric": "accuracy", "max_drop": 0.1, "on": "int9"}]}, "did you mean `int8`"),
        ({"gates": [{"metric": "latency", "max_drop": 0.1}]}, "min_speedup"),
        ({"gates": [{"metric": "accuracy"}]}, "exactly one limit"),
        ({"gates": [{"metric": "accuracy", "max_drop": 0.1, "over": "int8", "on": "int8"}]}, "with itself"),
    ],
)
def test_mistakes_in_the_block(block: Any, message: str, document: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        load({**document, "against": block}, env=False)
    told = " ".join(f"{one.message} {one.hint}" for one in caught.value.diagnostics)
    assert message in told
    assert all(one.path.startswith("against") for one in caught.value.diagnostics)
