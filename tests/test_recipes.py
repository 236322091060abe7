"""Every recipe that users copy runs here, on its real model and data, shrunk through `--set`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rounds import of_two_rounds

import optimize
from optimize.recipe import load
from optimize.source import locate
from optimize.work import Work

RECIPES = Path(__file__).parents[1] / "recipes"

UNTIMED = ["evaluate.latency=null", "evaluate.peak_memory=false", "promote=null"]
TRAINED = ["stages.teacher.threads=1", *UNTIMED]
CLASSIFIER = ["data.max_rows=160", *TRAINED]
"""The same rows and training everywhere, so that the teacher and its graph are made once for all of them."""
LANGUAGE_MODEL = ["data.max_rows=400", "data.context_length=64", "data.max_windows=8", *UNTIMED]
SHORTENED = "SHORTENED"
"""Stands for the file that the fixture `few_blocks` makes."""
FEW_BLOCKS = [*LANGUAGE_MODEL, f"model.source={SHORTENED}"]
GPTQ = ["stages.gptq.calibration={num_samples: 4, max_length: 64}", "stages.gptq.targets=['*.layers.[01].*']"]
SHRUNK: dict[str, list[str]] = {
    "wikitext-questions": [
        *TRAINED,
        "data.max_rows=60",
        "stages.teacher.epochs=1",
        "gates=[{metric: f1, max_drop: 1}, {metric: size, max_ratio: 0.35}]",
    ],
    "tatoeba-translation": [
        *TRAINED,
        "data.max_rows=200",
        "data.max_new_tokens=8",
        "stages.teacher.epochs=1",
        "gates=[{metric: rougeL, max_drop: 1}, {metric: size, max_ratio: 0.5}]",
    ],
    "minilm-fill-mask": [
        *TRAINED,
        "data.max_rows=160",
        "gates=[{metric: pseudo_perplexity, max_ratio: 1.1}, {metric: size, max_ratio: 0.5}]",
    ],
    "minilm-ner": [
        *TRAINED,
        "data.max_rows=200",
        "stages.teacher.epochs=1",
        "gates=[{metric: token_accuracy, max_drop: 0.1}, {metric: size, max_ratio: 0.35}]",
    ],
    "minilm-int8-static": [
        *CLASSIFIER,
        "stages.int8.calibration.num_samples=8",
        "stages.int8.max_drop=null",
        "gates=[{metric: accuracy, max_drop: 0.2}, {metric: size, max_ratio: 0.35}]",
    ],
    "minilm-openvino": [
        *CLASSIFIER,
        "stages.openvino-int8.calibration.num_samples=8",
        "gates=[{metric: accuracy, max_drop: 0.2}, {metric: size, max_ratio: 0.35}]",
    ],
    "minilm-similarity": [
        *UNTIMED,
        "data.max_rows=200",
        "gates=[{metric: spearman, max_drop: 0.05}, {metric: size, max_ratio: 0.35}]",
    ],
    "minilm-pytorch": [
        *CLASSIFIER,
        # Compiling takes half a minute each; `test_torch_export_export.py` compiles a float model.
        "stages.torch_export.aot_inductor=false",
        "stages.qat-compiled.aot_inductor=false",
        "stages.qat.threads=1",
        "gates=[{metric: size, on: [int8-compiled, qat-compiled], max_ratio: 0.8}]",
    ],
    "minilm-qat": [
        *CLASSIFIER,
        "stages.static.calibration.num_samples=8",
        "stages.qat.calibration.num_samples=8",
        "stages.qat.threads=1",
        "gates=[{metric: size, on: qat, max_ratio: 0.35}]",
    ],
    "minilm-pruned": [
        *CLASSIFIER,
        "stages.pruned.steps=1",
        "stages.pruned.calibration.num_samples=8",
        "gates=[{metric: size, on: int8, max_ratio: 0.3}]",
    ],
    "minilm-layers": [
        *CLASSIFIER,
        "stages.shallow.calibration.num_samples=8",
        "stages.features.epochs=1",
        "gates=[{metric: size, on: shallow-onnx, max_ratio: 0.9}]",
    ],
    "minilm-small": [
        *CLASSIFIER,
        "stages.layers.calibration.num_samples=8",
        "stages.structured.calibration.num_samples=8",
        "stages.features.epochs=1",
        "stages.features.threads=1",
        "stages.logits.threads=1",
        "stages.int8.calibration.num_samples=8",
        "gates=[{metric: accuracy, max_drop: 1}, {metric: size, max_ratio: 0.2}]",
    ],
    "minilm-student": [
        *CLASSIFIER,
        "stages.features.epochs=1",
        "stages.features.threads=1",
        "stages.taught.threads=1",
        "gates=[{metric: accuracy, max_drop: 1}, {metric: size, max_ratio: 0.25}]",
    ],
    "digits": [
        "data.max_rows=600",
        "stages.trained.epochs=1",
        "stages.trained.threads=1",
        "stages.int8.calibration.num_samples=32",
        "evaluate.latency.batch_sizes=[1]",
    ],
    "quickstart": [
        "data.max_rows=160",
        "stages.teacher.threads=1",
        "evaluate.latency.batch_sizes=[1]",
        "evaluate.latency.sequence_length=32",
    ],
    # Every timed round starts a process for each artifact, which is much for models of this size.
    "smollm2-gptq": [
        *FEW_BLOCKS,
        *GPTQ,
        "gates=[{metric: perplexity, max_ratio: 1.5}, {metric: size, max_ratio: 0.9}]",
    ],
    "smollm2-sparse": [
        *FEW_BLOCKS,
        "stages.magnitude.targets=['*.layers.[01].*']",
        "stages.wanda.calibration={num_samples: 4, max_length: 64}",
        "stages.wanda.targets=['*.layers.[01].*']",
        "stages.sparsegpt.calibration={num_samples: 4, max_length: 64}",
        "stages.sparsegpt.targets=['*.layers.[01].*']",
        *GPTQ,
        "gates=[{metric: perplexity, max_ratio: 1.5, on: [wanda, sparsegpt, gptq]}, {metric: size, max_ratio: 1.01}]",
    ],
    "smollm2-int8": [*LANGUAGE_MODEL, "gates=[{metric: perplexity, max_ratio: 1.5}, {metric: size, max_ratio: 0.45}]"],
    "smollm2-nf4": [
        *FEW_BLOCKS,
        "gates=[{metric: perplexity, max_ratio: 2}, {metric: size, max_ratio: 0.6}]",
    ],
}
"""What makes each recipe small. The only place where recipes are shrunk."""


BLOCKS = 3
"""Of SmolLM2's 30, what recipes of language models are run on here; the head, and one whole model, are large enough."""


@pytest.fixture(scope="module")
def shared_work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """One work folder, as a person has it: recipes that begin with the same model share it, in every test process."""
    folder = tmp_path_factory.getbasetemp()
    return Work((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "recipes")


@pytest.fixture(scope="module")
def few_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' GGUF file without its last blocks: the same tokenizer, embedding and first weights."""
    library = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    recipe = load(RECIPES / "smollm2-int8.yaml")
    source = recipe.model.source
    assert source
    locate(source, recipe.base, "model").copy(["*.gguf"], folder)
    (whole,) = folder.iterdir()
    reader = library.GGUFReader(whole)
    path = folder / "few-blocks.gguf"
    writer = library.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value = BLOCKS if field.name.endswith(".block_count") else field.contents()
            writer.add_key_value(field.name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        kind, _, rest = tensor.name.partition(".")
        if kind != "blk" or int(rest.partition(".")[0]) < BLOCKS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_recipe_is_run() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SHRUNK)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(SHRUNK))
def test_recipe_runs(name: str, shared_work: Work, request: pytest.FixtureRequest) -> None:
    overrides = SHRUNK[name]
    if f"model.source={SHORTENED}" in overrides:
        overrides = [*overrides, f"model.source={request.getfixturevalue('few_blocks')}"]
    recipe = of_two_rounds(load(RECIPES / f"{name}.yaml", overrides))
    run = optimize.apply(recipe, work=shared_work)
    assert run.document["error"] is None
    assert run.verdict in ("pass", "fail", "inconclusive")
    assert run.document["gates"]
    for artifact in run.document["artifacts"]:
        if recipe.evaluate.latency:
            assert artifact["scores"]["latency"]
            assert artifact["scores"]["peak_memory_bytes"] > artifact["size_bytes"] / 10
    again = optimize.apply(recipe, work=shared_work)
    assert all(artifact["cached"] for artifact in again.document["artifacts"])
    assert again.document["gates"] == run.document["gates"]
    assert json.loads((again.directory / "run.json").read_text())["verdict"] == again.verdict
