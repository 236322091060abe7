"""Every recipe that users copy runs here, on its real model and data, shrunk through `--set`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import optimize
from optimize.work import Work

RECIPES = Path(__file__).parents[1] / "recipes"

LANGUAGE_MODEL = [
    "data.max_rows=400",
    "data.context_length=64",
    "data.max_windows=24",
    "evaluate.latency=null",
    "evaluate.peak_memory=false",
]
SHRUNK: dict[str, list[str]] = {
    "wikitext-questions": [
        "data.max_rows=60",
        "stages.teacher.epochs=1",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: f1, max_drop: 1}, {metric: size, max_ratio: 0.35}]",
    ],
    "tatoeba-translation": [
        "data.max_rows=200",
        "data.max_new_tokens=8",
        "stages.teacher.epochs=1",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: rougeL, max_drop: 1}, {metric: size, max_ratio: 0.5}]",
    ],
    "minilm-fill-mask": [
        "data.max_rows=400",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: pseudo_perplexity, max_ratio: 1.1}, {metric: size, max_ratio: 0.5}]",
        "promote=null",
    ],
    "minilm-ner": [
        "data.max_rows=300",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "stages.teacher.epochs=1",
        "gates=[{metric: token_accuracy, max_drop: 0.1}, {metric: size, max_ratio: 0.35}]",
        "promote=null",
    ],
    "minilm-int8-static": [
        "data.max_rows=400",
        "stages.int8.calibration.num_samples=16",
        "stages.int8.max_drop=null",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: accuracy, max_drop: 0.2}, {metric: size, max_ratio: 0.35}]",
        "promote=null",
    ],
    "minilm-openvino": [
        "data.max_rows=400",
        "stages.openvino-int8.calibration.num_samples=16",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: accuracy, max_drop: 0.2}, {metric: size, max_ratio: 0.35}]",
        "promote=null",
    ],
    "minilm-similarity": [
        "data.max_rows=200",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: spearman, max_drop: 0.05}, {metric: size, max_ratio: 0.35}]",
        "promote=null",
    ],
    "minilm-pytorch": [
        "data.max_rows=400",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: size, on: int8-compiled, max_ratio: 0.8}]",
        "promote=null",
    ],
    "minilm-qat": [
        "data.max_rows=400",
        "stages.static.calibration.num_samples=16",
        "stages.qat.calibration.num_samples=16",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: size, on: qat, max_ratio: 0.35}]",
        "promote=null",
    ],
    "minilm-pruned": [
        "data.max_rows=160",
        "stages.pruned.steps=1",
        "stages.pruned.calibration.num_samples=8",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: size, on: int8, max_ratio: 0.3}]",
        "promote=null",
    ],
    "minilm-layers": [
        "data.max_rows=160",
        "stages.shallow.calibration.num_samples=8",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: size, on: shallow-onnx, max_ratio: 0.9}]",
        "promote=null",
    ],
    "minilm-small": [
        "data.max_rows=160",
        "stages.layers.calibration.num_samples=8",
        "stages.structured.calibration.num_samples=8",
        "stages.features.epochs=1",
        "stages.int8.calibration.num_samples=16",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: accuracy, max_drop: 1}, {metric: size, max_ratio: 0.2}]",
        "promote=null",
    ],
    "minilm-student": [
        "data.max_rows=160",
        "stages.features.epochs=1",
        "evaluate.latency=null",
        "evaluate.peak_memory=false",
        "gates=[{metric: accuracy, max_drop: 1}, {metric: size, max_ratio: 0.25}]",
        "promote=null",
    ],
    "digits": [
        "data.max_rows=600",
        "stages.trained.epochs=1",
        "stages.int8.calibration.num_samples=32",
        "evaluate.latency.batch_sizes=[1]",
        "evaluate.latency.half_width=1.0",
        "evaluate.latency.budget_seconds=60",
    ],
    "quickstart": [
        "data.max_rows=400",
        "evaluate.latency.batch_sizes=[1]",
        "evaluate.latency.sequence_length=32",
        "evaluate.latency.half_width=1.0",
        "evaluate.latency.budget_seconds=60",
    ],
    # Every timed round starts a process for each artifact, which is much for models of this size.
    "smollm2-gptq": [
        *LANGUAGE_MODEL,
        "stages.gptq.calibration={num_samples: 4, max_length: 64}",
        "stages.gptq.targets=['*.layers.[01].*']",
        "gates=[{metric: perplexity, max_ratio: 1.5}, {metric: size, max_ratio: 0.9}]",
        "promote=null",
    ],
    "smollm2-sparse": [
        *LANGUAGE_MODEL,
        "data.max_windows=8",
        "stages.magnitude.targets=['*.layers.[01].*']",
        "stages.wanda.calibration={num_samples: 4, max_length: 64}",
        "stages.wanda.targets=['*.layers.[01].*']",
        "stages.sparsegpt.calibration={num_samples: 4, max_length: 64}",
        "stages.sparsegpt.targets=['*.layers.[01].*']",
        "stages.gptq.calibration={num_samples: 4, max_length: 64}",
        "stages.gptq.targets=['*.layers.[01].*']",
        "gates=[{metric: perplexity, max_ratio: 1.5, on: [wanda, sparsegpt, gptq]}, {metric: size, max_ratio: 1.01}]",
    ],
    "smollm2-int8": [*LANGUAGE_MODEL, "gates=[{metric: perplexity, max_ratio: 1.5}, {metric: size, max_ratio: 0.45}]"],
    "smollm2-nf4": [
        *LANGUAGE_MODEL,
        "gates=[{metric: perplexity, max_ratio: 2}, {metric: size, max_ratio: 0.6}]",
        "promote=null",
    ],
}
"""What makes each recipe small. The only place where recipes are shrunk."""


@pytest.fixture(scope="module")
def shared_work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """One work folder, as a person has it: recipes that begin with the same model share it."""
    return Work(tmp_path_factory.mktemp("recipes") / "work")


def test_every_recipe_is_run() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SHRUNK)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(SHRUNK))
def test_recipe_runs(name: str, shared_work: Work) -> None:
    run = optimize.apply(RECIPES / f"{name}.yaml", work=shared_work, overrides=SHRUNK[name])
    assert run.document["error"] is None
    assert run.verdict in ("pass", "fail", "inconclusive")
    assert run.document["gates"]
    timed = "evaluate.latency=null" not in SHRUNK[name]
    for artifact in run.document["artifacts"]:
        if timed:
            assert artifact["scores"]["latency"]
            assert artifact["scores"]["peak_memory_bytes"] > artifact["size_bytes"] / 10
    again = optimize.apply(RECIPES / f"{name}.yaml", work=shared_work, overrides=SHRUNK[name])
    assert all(artifact["cached"] for artifact in again.document["artifacts"])
    assert again.document["gates"] == run.document["gates"]
    assert json.loads((again.directory / "run.json").read_text())["verdict"] == again.verdict
