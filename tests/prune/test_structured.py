"""`prune: structured`: plain checkpoints where config.json can say so, shapes beside them where not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import TRAINING, Place
from pydantic import ValidationError

import optimize
from optimize import runtimes, shapes
from optimize.artifact import Artifact
from optimize.distill import finetune
from optimize.errors import RecipeError, StageError
from optimize.export import onnx, openvino, torchscript
from optimize.prune import recovery, structured, targets
from optimize.prune.structured import Config
from optimize.prune.targets import smallest_ratio
from optimize.quantize import cast, int8_bitsandbytes, int8_onnxruntime, int8_torchao
from optimize.recipe import load

QUICK: dict[str, Any] = {
    "pruning_ratio": 0.5,
    "device": "cpu",
    "calibration": {"num_samples": 16, "max_length": 32, "batch_size": 8},
    "latency": {"sequence_length": 16},
}


def pruned(place: Place, **settings: Any) -> Artifact:
    return structured.run(place.artifact, Config(**{**QUICK, **settings}), place.room())


def logits(place: Place, artifact: Artifact, model: Any = None) -> np.ndarray[Any, Any]:
    """What a model answers to the same rows, through its runtime."""
    context = place.room()
    runner = runtimes.open_artifact(artifact, 1) if model is None else model
    preprocessor = context.task.preprocessor(place.artifact.path)
    inputs = context.task.latency_inputs(
        preprocessor, context.data.rows("validation"), place.artifact.task, batch_size=2, sequence_length=16
    )
    return np.asarray(runner.run(inputs)["logits"])


@pytest.fixture(scope="module")
def without_heads(bert: Place) -> Artifact:
    """Half of the heads and widths of a BERT: what its config.json can't say."""
    return pruned(bert)


# What comes out


def test_widths_that_a_config_can_say_make_a_plain_checkpoint(bert: Place) -> None:
    from transformers import AutoModelForSequenceClassification

    artifact = pruned(bert, units=["ffn"])
    assert artifact.details["plain"]
    assert shapes.FILE not in artifact.files
    model, loading = AutoModelForSequenceClassification.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.intermediate_size == model.bert.encoder.layer[2].output.dense.in_features == 32
    with torch.no_grad():
        ids = torch.tensor([[2, 7, 8, 3]])
        expected = model.eval()(ids).logits.numpy()
    got = runtimes.open_artifact(artifact, 1).run({"input_ids": ids.numpy()})["logits"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [["heads", "ffn"], ["heads", "ffn", "hidden"]])
def test_a_decoder_stays_plain_and_writes_on(llama: Place, kinds: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    artifact = pruned(llama, units=kinds, pruning_ratio=0.34)
    assert artifact.details["plain"]
    model, loading = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(loading.values())
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.intermediate_size == 64
    assert config.hidden_size == (64 if "hidden" in kinds else 96)
    # With its cache and without.
    runner = runtimes.open_artifact(artifact, 1)
    ids = np.array([[5, 9, 77, 30, 12]])
    decoder = runner.decoder(8)
    decoder.forward(ids[0, :3])
    decoder.forward(ids[0, 3:4])
    np.testing.assert_allclose(decoder.forward(ids[0, 4:]), runner.run({"input_ids": ids})["logits"][0, -1], atol=1e-4)


def test_what_a_config_cannot_say_lies_beside_the_weights(bert: Place, without_heads: Artifact) -> None:
    from transformers import AutoModelForSequenceClassification

    details = without_heads.details
    assert not details["plain"]
    told = shapes.read(without_heads.path)
    assert told is not None
    assert told["shapes"]["bert.encoder.layer.1.attention.self.query.weight"] == [16, 32]
    # What can be said is said there.
    assert json.loads((without_heads.path / "config.json").read_text())["intermediate_size"] == 32
    assert not any("intermediate" in name for name in told["shapes"])
    with pytest.raises(RuntimeError):
        AutoModelForSequenceClassification.from_pretrained(without_heads.path)
    model = optimize.load(without_heads.path, threads=1)
    assert model.predict(["a good film"])[0]["label"] in ("negative", "positive")
    with torch.no_grad():
        expected = bert.load(without_heads)(input_ids=torch.tensor([[2, 7, 3]])).logits.numpy()
    np.testing.assert_allclose(model.runner.run({"input_ids": np.array([[2, 7, 3]])})["logits"], expected, atol=1e-5)


def test_the_counts_are_honest(bert: Place, without_heads: Artifact) -> None:
    details = without_heads.details
    before, after = bert.load(), bert.load(without_heads)
    assert details["params"] == {
        "before": sum(p.numel() for p in before.parameters()),
        "after": sum(p.numel() for p in after.parameters()),
    }
    assert runtimes.get("transformers").parameters(without_heads.path) == details["params"]["after"]
    tokens, width = 16, 32
    # Of 16 tokens: q, k, v and output; attention twice; feed-forward; then pooler and head of one token.
    for side, heads, inner in (("before", 4, 64), ("after", 2, 32)):
        block = tokens * (4 * width * 8 * heads + 2 * tokens * 8 * heads + 2 * width * inner)
        assert details["macs"][side] == 3 * block + width * width + 2 * width


def test_importances_are_in_the_manifest(without_heads: Artifact) -> None:
    told = without_heads.details["steps"][0]["importance"]["bert.encoder.layer.0.attention.output.dense"]
    order = np.argsort(told["units"], kind="stable")
    assert sorted(order[:2]) == told["dropped"]
    units = without_heads.details["units"]["bert.encoder.layer.0.attention.output.dense"]
    assert units == {"kind": "heads", "before": 4, "after": 2}


def test_global_ranking_makes_layers_differ(bert: Place) -> None:
    artifact = pruned(bert, global_pruning=True, units=["ffn"], pruning_ratio=0.4, importance="taylor", round_to=1)
    widths = {told["after"] for told in artifact.details["units"].values()}
    assert len(widths) > 1
    assert not artifact.details["plain"]
    assert logits(bert, artifact).shape == (2, 2)


@pytest.mark.parametrize("kind", ["l1", "l2", "hessian", "random"])
def test_other_importances(bert: Place, kind: str) -> None:
    artifact = pruned(bert, importance=kind, units=["ffn"])
    assert artifact.details["units"]["bert.encoder.layer.0.output.dense"]["after"] == 32


def test_targets_and_ignore_choose_layers(bert: Place) -> None:
    artifact = pruned(bert, targets=["*.layer.[01].*"], ignore=["*.attention.*"])
    assert list(artifact.details["units"]) == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
    with pytest.raises(StageError, match="matches no layer"):
        pruned(bert, targets=["*.mlp.*"])


def test_images_and_modules_of_one_s_own(vit: Place, convnet: Place) -> None:
    transformer = pruned(vit)
    assert [told["after"] for told in transformer.details["units"].values()] == [1, 32, 1, 32]
    network = pruned(convnet, round_to=4, recovery=TRAINING)
    assert [told["after"] for told in network.details["units"].values()] == [4, 4, 8, 8, 16, 16]
    assert shapes.FILE in network.files
    assert network.size_bytes < convnet.artifact.size_bytes / 2
    assert {"loss", "accuracy"} <= set(network.details["steps"][0]["recovery"]["validation"])
    exported = onnx.run(network, onnx.Config(), convnet.room())
    assert exported.details["max_difference"] < 1e-4


# What follows


@pytest.fixture(scope="module")
def graph(bert: Place, without_heads: Artifact) -> Artifact:
    return onnx.run(without_heads, onnx.Config(), bert.room())


def test_exports_take_it(bert: Place, without_heads: Artifact, graph: Artifact) -> None:
    expected = logits(bert, without_heads)
    for method, given in ((openvino, without_heads), (torchscript, without_heads)):
        artifact = method.run(given, method.Config(), bert.room())
        np.testing.assert_allclose(logits(bert, artifact), expected, atol=1e-4)
    np.testing.assert_allclose(logits(bert, graph), expected, atol=1e-4)


def test_quantisation_takes_it(bert: Place, without_heads: Artifact, graph: Artifact) -> None:
    expected = logits(bert, without_heads)
    made = [
        int8_onnxruntime.run(graph, int8_onnxruntime.Config(mode="dynamic"), bert.room()),
        int8_bitsandbytes.run(without_heads, int8_bitsandbytes.Config(device="cpu"), bert.room()),
        int8_torchao.run(without_heads, int8_torchao.Config(), bert.room()),
        cast.run(without_heads, cast.Config(), bert.room()),
    ]
    for artifact in made:
        assert (shapes.FILE in artifact.files) == (artifact.format == "transformers")
        difference = np.abs(logits(bert, artifact) - expected).max()
        assert difference < 0.1 * np.abs(expected).max()


def test_gptq_takes_it(bert: Place, without_heads: Artifact) -> None:
    from optimize.quantize import gptq

    settings = {"group_size": 32, "bits": 8, "compute_dtype": "float32", "device": "cpu", "threads": 1}
    config = gptq.Config(calibration={"num_samples": 8, "max_length": 16}, ignore=["*.attention.*"], **settings)
    artifact = gptq.run(without_heads, config, bert.room())
    difference = np.abs(logits(bert, artifact) - logits(bert, without_heads)).max()
    assert difference < 0.05


def test_finetuning_takes_it_and_hands_it_on(bert: Place, without_heads: Artifact) -> None:
    artifact = finetune.run(without_heads, finetune.Config(**TRAINING), bert.room())
    assert shapes.read(artifact.path) == shapes.read(without_heads.path)
    assert np.abs(logits(bert, artifact) - logits(bert, without_heads)).max() > 1e-4


def test_it_can_be_pruned_again(bert: Place, without_heads: Artifact) -> None:
    config = Config(**{**QUICK, "pruning_ratio": 0.5, "units": ["heads"]})
    artifact = structured.run(without_heads, config, bert.room())
    units = artifact.details["units"].values()
    assert {(told["before"], told["after"]) for told in units} == {(2, 1)}
    told = shapes.read(artifact.path)
    assert told is not None
    assert told["shapes"]["bert.encoder.layer.0.attention.self.query.weight"] == [8, 32]


def test_a_decoder_with_uneven_heads_is_exported(llama: Place) -> None:
    artifact = pruned(llama, units=["heads"], global_pruning=True, pruning_ratio=0.4, importance="random", seed=3)
    assert not artifact.details["plain"]
    assert len({told["after"] for told in artifact.details["units"].values()}) > 1
    exported = onnx.run(artifact, onnx.Config(), llama.room())
    ids = np.array([5, 9, 77, 30])
    ours = runtimes.open_artifact(artifact, 1).decoder(8).forward(ids)
    np.testing.assert_allclose(runtimes.open_artifact(exported, 1).decoder(8).forward(ids), ours, atol=1e-3)


# Steps


STEPS: dict[str, Any] = {"steps": 2, "recovery": TRAINING}


@pytest.fixture(scope="module")
def stepwise(bert: Place) -> Artifact:
    return pruned(bert, **STEPS)


def test_steps_with_recovery(stepwise: Artifact, without_heads: Artifact) -> None:
    steps = stepwise.details["steps"]
    assert [step["pruning_ratio"] for step in steps] == [0.25, 0.5]
    assert all(step["recovery"]["steps"] > 0 for step in steps)
    assert stepwise.details["params"] == without_heads.details["params"]
    assert steps[0]["params"] > steps[1]["params"]


def test_the_same_bytes_again_and_after_a_kill(
    bert: Place, stepwise: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    recover, calls = recovery.recover, []

    def dies(*args: Any) -> Any:
        calls.append(args[-1])
        if len(calls) == 2:
            raise Killed
        return recover(*args)

    config = Config(**{**QUICK, **STEPS})
    monkeypatch.setattr(recovery, "recover", dies)
    with pytest.raises(Killed):
        structured.run(bert.artifact, config, bert.room(scratch=tmp_path))
    assert (tmp_path / "step-1" / "report.json").exists()
    patched: list[int] = []
    monkeypatch.setattr(recovery, "recover", lambda *args: patched.append(args[-1]) or recover(*args))
    artifact = structured.run(bert.artifact, config, bert.room(scratch=tmp_path))
    assert patched == [2]
    assert artifact.digest == stepwise.digest


# Targets


@pytest.mark.parametrize(("name", "share"), [("max_params", 0.8), ("max_macs", 0.6)])
def test_a_target_is_reached_by_the_smallest_ratio(
    bert: Place, without_heads: Artifact, name: str, share: float
) -> None:
    counted = name.removeprefix("max_")
    target = int(without_heads.details[counted]["before"] * share)
    artifact = pruned(bert, pruning_ratio=None, **{name: target}, round_to=1)
    found = artifact.details
    assert found[counted]["after"] <= target
    smaller = pruned(bert, pruning_ratio=found["pruning_ratio"] - 0.01, round_to=1)
    assert smaller.details[counted]["after"] > target
    assert found["search"]["probes"]


def test_a_latency_target_is_measured_on_the_exported_graph(bert: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def timed(artifact: Artifact, inputs: Mapping[str, Any], threads: int) -> float:
        assert inputs["input_ids"].shape == (2, 16)
        asked.append((artifact.format, threads))
        sizes.append(runtimes.get("onnx").parameters(artifact.path))
        return 200.0 - (sizes[0] - sizes[-1])

    sizes: list[int] = []
    monkeypatch.setattr(targets, "milliseconds", timed)
    monkeypatch.setattr(targets, "LARGEST", 3)
    latency = {"batch_size": 2, "sequence_length": 16, "threads": 1}
    settings = {"pruning_ratio": None, "max_latency_ms": 100.0, "units": ["ffn"], "round_to": 1}
    artifact = pruned(bert, latency=latency, importance="l1", **settings)
    assert asked == [("onnx", 1)] * 2
    # Of 64 channels in three layers 63 stay at two per cent, and 62 at three.
    assert artifact.details["pruning_ratio"] == 0.03
    probes = [{"pruning_ratio": 0.02, "value": 200.0}, {"pruning_ratio": 0.03, "value": 7.0}]
    assert artifact.details["search"] == {"max_latency_ms": 100.0, "probes": probes}


def test_milliseconds_are_real(graph: Artifact) -> None:
    from optimize.prune.targets import milliseconds

    inputs = {name: np.ones((1, 8), dtype=np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert 0 < milliseconds(graph, inputs, 1) < 1000


def test_bisection() -> None:
    ratio, probes = smallest_ratio(0.435, lambda ratio: 1 - ratio)
    assert ratio == 0.57
    assert len(probes) <= 7

    def limited(ratio: float) -> float:
        if ratio > 0.5:
            raise StageError("too much", hint="less")
        return 1 - ratio

    assert smallest_ratio(0.6, limited)[0] == 0.4
    with pytest.raises(StageError, match=r"no pruning_ratio reaches the target: 0\.5"):
        smallest_ratio(0.4, limited)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "none is given"),
        ({"pruning_ratio": 0.3, "max_params": 5}, "pruning_ratio and max_params are given"),
        ({"pruning_ratio": 1.0}, "less than 1"),
        ({"pruning_ratio": 0.95, "global_pruning": True}, "more than max_pruning_ratio"),
    ],
)
def test_mistakes_that_validation_sees(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**settings)


def test_a_recipe_says_what_is_wrong_with_it(pico_recipe: dict[str, Any]) -> None:
    pico_recipe["model"]["task"] = "sentence-similarity"
    pico_recipe["data"] = {"source": pico_recipe["data"]["source"], "score": "label", "pooling": "mean"}
    pico_recipe["stages"] = [{"prune": "structured", "pruning_ratio": 0.3}]
    pico_recipe["baseline"], pico_recipe["gates"] = "source", []
    with pytest.raises(RecipeError) as caught:
        load(pico_recipe)
    assert any("no loss" in one.message or "a loss" in one.message for one in caught.value.diagnostics)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": ["heads"], "pruning_ratio": 0.9}, "leaves nothing of the 4 units"),
        ({"units": ["ffn"], "pruning_ratio": 0.9, "round_to": 64}, "in multiples of 64"),
        ({"units": ["channels"]}, "has no channels to prune"),
    ],
)
def test_what_would_leave_nothing_ends_without_an_artifact(bert: Place, settings: dict[str, Any], message: str) -> None:
    context = bert.room()
    with pytest.raises(StageError, match=message):
        structured.run(bert.artifact, Config(**{**QUICK, **settings}), context)
    assert not any(context.directory.iterdir())


def test_a_group_without_keys_is_refused(llama: Place) -> None:
    with pytest.raises(StageError, match="leaves nothing of the 3 units"):
        pruned(llama, units=["heads"], pruning_ratio=0.9)


def test_a_graph_that_is_misread_is_noticed(bert: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were torch-pruning to mix up rows and columns of a layer, the self-check would see it."""
    from optimize.prune import narrowing

    real = narrowing.drop

    def wrong(model: Any, dimensions: Any, dropped: Any) -> None:
        real(model, dimensions, {name: [0, 1] if units else [] for name, units in dropped.items()})

    monkeypatch.setattr(narrowing, "drop", wrong)
    with pytest.raises(StageError, match="answers otherwise than with them masked"):
        pruned(bert, units=["heads"], importance="random", seed=2)
