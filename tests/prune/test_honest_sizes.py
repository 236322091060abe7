"""A run with pruned artifacts says what their zeros are, and what they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.recipe import load
from optimize.work import Work

CALIBRATION = {"num_samples": 8, "max_length": 32}


@pytest.fixture
def recipe(pico_llama: Path, pico_corpus: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "pico-sparse",
        "model": {"source": str(pico_llama), "task": "causal-lm"},
        "data": {
            "source": str(pico_corpus),
            "context_length": 32,
            "max_windows": 20,
            "splits": {"calibration": 0.5, "evaluation": 0.5},
        },
        "stages": [
            {"prune": "unstructured", "name": "sparse", "mask_structure": "2:4", "calibration": CALIBRATION},
            {"quantize": "gptq", "group_size": 32, "calibration": CALIBRATION},
            {"quantize": "cast", "from": "source"},
        ],
        "evaluate": {"latency": None, "peak_memory": False},
        "gates": [{"metric": "size", "max_ratio": 1.1}],
    }


def test_scores_count_the_zeros_and_the_table_says_what_they_do_not_mean(recipe: dict[str, Any], work: Work) -> None:
    run = optimize.apply(recipe, work=work)
    scores = {one["name"]: one["scores"] for one in run.document["artifacts"]}
    assert scores["sparse"]["sparsity"] == 0.5
    assert scores["gptq"]["sparsity"] >= 0.5
    assert "sparsity" not in scores["source"]
    assert "sparsity" not in scores["cast"]
    sizes = {one["name"]: one["size_bytes"] for one in run.document["artifacts"]}
    assert sizes["sparse"] >= sizes["source"]
    words = " ".join(str(run.table()).split())
    assert "Weights that are 0 in pruned layers: sparse 50.0%, gptq" in words
    assert "make nothing smaller or faster by themselves" in words
    assert "make nothing smaller or faster by themselves" in run._repr_html_()
    again = optimize.apply(recipe, work=work)
    assert again.document["artifacts"][1]["scores"] == run.document["artifacts"][1]["scores"]
    recipe["stages"] = recipe["stages"][2:]
    assert "Weights that are 0" not in str(optimize.apply(recipe, work=work).table())


def test_a_pattern_is_read_and_comes_back(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][0]["mask_structure"] = "1:4"
    read = load(recipe)
    assert load(read.document(), base=read.base).digest == read.digest
    assert read.stages[0].config.structure.sparsity == 0.25
    path = tmp_path / "recipe.yaml"
    stages = "stages:\n  - prune: unstructured\n    mask_structure: 2:4\n"  # which YAML 1.1 takes for a time of day
    model = f"model: {{source: {recipe['model']['source']}, task: causal-lm}}\n"
    path.write_text(f"version: 1\nname: x\n{model}data: {{source: {recipe['data']['source']}}}\n{stages}")
    assert load(path).stages[0].config.mask_structure == "2:4"
