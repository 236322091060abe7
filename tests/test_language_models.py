"""A recipe for a language model: what it may say of speed, and a run of it from text to verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rounds import of_two_rounds

import optimize
from optimize.errors import RecipeError
from optimize.recipe import load
from optimize.report.table import Table
from optimize.work import Work


@pytest.fixture
def recipe(pico_llama: Path, pico_corpus: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "pico-llama",
        "model": {"source": str(pico_llama), "task": "causal-lm"},
        "data": {
            "source": str(pico_corpus),
            "context_length": 32,
            "max_windows": 20,
            "splits": {"calibration": 0.5, "evaluation": 0.5},
        },
        "stages": [{"quantize": "cast", "dtype": "bfloat16"}],
        "evaluate": {
            "latency": {"prefill": [16, 48], "decode": {"prompt_length": 16, "new_tokens": 8}, "budget_seconds": 1.0}
        },
        "gates": [
            {"metric": "perplexity", "max_ratio": 1.05},
            {"metric": "prefill", "max_ms": 10_000},
            {"metric": "decode", "min_speedup": 0.001},
            {"metric": "size", "max_ratio": 0.6},
        ],
    }


# What it may say


def test_speed_is_that_of_a_prompt_and_of_what_follows(recipe: dict[str, Any]) -> None:
    del recipe["evaluate"]
    read = load(recipe)
    assert read.document()["evaluate"]["latency"] == {
        "prefill": [128],
        "decode": {"prompt_length": 128, "new_tokens": 64},
        **{"threads": 1, "rounds": 6, "half_width": 0.03, "budget_seconds": 90.0},
    }
    assert load(read.document(), base=read.base).digest == read.digest


@pytest.mark.parametrize(
    ("change", "path", "message", "hint"),
    [
        (
            {"evaluate": {"latency": {"batch_sizes": [1]}}},
            *("evaluate.latency.batch_sizes", "`batch_sizes` does not apply to causal-lm"),
            "its speed is measured at `prefill` and `decode`",
        ),
        (
            {"gates": [{"metric": "latency", "min_speedup": 1.5}]},
            *("gates[0].metric", "`latency` does not apply to causal-lm", "its speed is `prefill` and `decode`"),
        ),
        (
            {"gates": [{"metric": "decode", "max_drop": 1}]},
            *("gates[0].max_drop", "`max_drop` makes no sense for `decode`: it is compared as a ratio"),
            "did you mean `min_speedup`?",
        ),
        (
            {"evaluate": {"latency": {"decode": None}}},
            *("gates[2].metric", "nothing measures `decode`", "turn on `evaluate.latency.decode`"),
        ),
        (
            {"evaluate": {"latency": None}, "promote": {"alias": "production", "select": "prefill"}, "gates": []},
            *("promote.select", "nothing measures `prefill`", "turn on `evaluate.latency`"),
        ),
        (
            {"evaluate": {"latency": {"prefill": []}}},
            *("evaluate.latency.prefill", "expected a list of whole numbers (1 or more), got a list", None),
        ),
        (
            {"promote": {"alias": "production", "select": "sped"}},
            *("promote.select", "nothing measures `sped`"),
            "known: decode, peak_memory, perplexity, prefill, size",
        ),
    ],
)
def test_a_mistake_about_speed(
    recipe: dict[str, Any], change: dict[str, Any], path: str, message: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as caught:
        load({**recipe, **change})
    assert (path, message, hint) in [(one.path, one.message, one.hint) for one in caught.value.diagnostics]


# From text to verdict


def test_a_run(recipe: dict[str, Any], work: Work) -> None:
    run = optimize.apply(of_two_rounds(load(recipe)), work=work)
    source, cast = run.document["artifacts"]
    for scores in (source["scores"], cast["scores"]):
        assert [(one["phase"], one["prompt_length"]) for one in scores["latency"]] == [
            *(("prefill", 16), ("prefill", 48), ("decode", 16))
        ]
        first, _, decode = scores["latency"]
        assert first["tokens_per_second"] == pytest.approx(16e3 / first["mean_ms"])
        assert decode["tokens_per_second"] == pytest.approx(1e3 / decode["mean_ms"])
        assert "throughput" not in decode
        assert scores["peak_memory_bytes"] > source["size_bytes"]
        assert scores["perplexity"]["value"] > 1
    judged = [(gate["metric"], gate["setting"]) for gate in run.document["gates"]]
    assert judged == [
        ("perplexity", None),
        ("prefill", "prompt_length=16,threads=1"),
        ("prefill", "prompt_length=48,threads=1"),
        ("decode", "prompt_length=16,new_tokens=8,threads=1"),
        ("size", None),
    ]
    # Of two rounds an interval can be wider than these gates, wide as they are.
    assert all(gate["verdict"] != "fail" for gate in run.document["gates"])
    table = Table(run.document)
    assert table.headers[1:5] == ["perplexity", "first token, prompt 16", "first token, prompt 48", "decode"]
    told = dict(zip(table.headers[1:], table.rows()[1][1], strict=False))
    assert told["first token, prompt 16"].value.endswith(" ms")
    assert told["decode"].value.endswith(" tokens/s")
    assert told["decode"].change.endswith("x")
