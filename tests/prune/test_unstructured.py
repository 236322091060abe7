"""`prune: unstructured`: as many zeros as asked for, better than magnitude, the same after a kill, clear words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import RecipeError, StageError
from optimize.progress import Progress
from optimize.prune import masks, unstructured
from optimize.prune.unstructured import Config, apply_to, run
from optimize.quantize import gptq
from optimize.quantize.checkpoint import linear_layers
from optimize.recipe import load
from optimize.tasks import Inputs

DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
OLDER = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "GPT2": ("LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "Bert": ("ForSequenceClassification", OLDER),
}
QUICK: dict[str, Any] = {"compute_dtype": "float32", "device": "cpu", "threads": 1}
METHODS = ("magnitude", "wanda", "sparsegpt")


def dense(name: str, **changes: Any) -> Any:
    """A pico model with random weights; always the same ones."""
    ending, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        configuration = getattr(transformers, f"{name}Config")(**config | changes)
        return getattr(transformers, name + ending)(configuration).eval()


def saved(model: Any, folder: Path, **options: Any) -> Artifact:
    model.save_pretrained(folder, **options)
    return Artifact.from_directory(folder, format="transformers", task={"name": "causal-lm"})


def tensors(artifact: Artifact) -> dict[str, Tensor]:
    return {name: value for file in artifact.path.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """Three batches of four rows; the last row of the first one is padded."""
    draw = np.random.default_rng(0)
    made = [{"input_ids": draw.integers(3, 96, (4, 24)), "attention_mask": np.ones((4, 24), int)} for _ in range(3)]
    made[0]["attention_mask"][-1, 16:] = 0
    for method in (unstructured, gptq):
        monkeypatch.setattr(method, "calibration_batches", lambda *_: made)
    return made


class Killed(BaseException):
    """Stands for a signal: nothing in the stage catches it."""


class Watch(Progress):
    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[float] = []
        self.warnings: list[str] = []

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        self.seen.append(done)
        if done == self.kill_at:
            raise Killed

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize("importance", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_layer_goes_and_all_else_stays(
    name: str, importance: Any, batches: list[Inputs], new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense(name), tmp_path)
    watch = Watch()
    result = run(source, Config(**QUICK, importance=importance), new_context(progress=watch))
    rows = {row["name"]: row for row in result.details["layers"]}
    assert all(row["zeros"] == 0.5 for row in rows.values())
    assert result.details["zeros"] == 0.5
    # It loads by itself, and holds what is said of it.
    model = transformers.AutoModel.from_pretrained(result.path)
    assert model.dtype == torch.float32
    before, after = tensors(source), tensors(result)
    assert before.keys() == after.keys()
    layers = masks.pruned_layers(result)
    assert layers == rows.keys()
    assert len(layers) == {"Llama": 14, "GPT2": 8, "Bert": 12}[name]
    for key in before:
        pruned = any(layer.endswith(key.removesuffix(".weight")) for layer in layers) and key.endswith(".weight")
        if pruned:
            assert float((after[key] == 0).double().mean()) == pytest.approx(0.5, abs=1e-4)
        else:
            assert torch.equal(before[key], after[key])
        if pruned and importance != "sparsegpt":  # what stays, stays as it was
            assert torch.equal(after[key], before[key].where(after[key] != 0, torch.zeros(())))
    assert masks.sparsity(result) == 0.5
    assert set(result.files) == {*source.files, masks.FILE}
    # No smaller, and it says so.
    assert result.size_bytes >= source.size_bytes
    assert any("neither smaller nor faster" in warning for warning in watch.warnings)
    # The same in memory.
    model = dense(name)
    assert apply_to(model, Config(**QUICK, importance=importance), batches) == result.details["layers"]
    for layer, module in linear_layers(model).items():
        if layer in rows:
            (stored,) = (
                value
                for key, value in after.items()
                if layer.endswith(key.removesuffix(".weight")) and "bias" not in key
            )
            assert torch.equal(stored, module.weight)


def test_wanda_and_sparsegpt_beat_magnitude_in_that_order(new_context: Callable[..., Context], tmp_path: Path) -> None:
    source = saved(dense("Llama"), tmp_path)
    wanda, sparsegpt, published = (
        run(source, Config(**QUICK, **settings), new_context()).details
        for settings in ({"importance": "wanda"}, {}, {"refine": 0})
    )
    assert sparsegpt["summary"]["mean_ratio"] < published["summary"]["mean_ratio"] < wanda["summary"]["mean_ratio"] < 1
    assert all(0 < row["error"] < row["magnitude_error"] for row in sparsegpt["layers"])
    assert sparsegpt["summary"]["layers"] == 14


@pytest.mark.parametrize("importance", METHODS)
def test_two_of_four(importance: Any, new_context: Callable[..., Context], tmp_path: Path) -> None:
    source = saved(dense("GPT2"), tmp_path)  # whose weights lie the other way round
    result = run(source, Config(**QUICK, importance=importance, mask_structure="2:4"), new_context())
    for key, value in tensors(result).items():
        if any(layer.endswith(key.removesuffix(".weight")) for layer in masks.pruned_layers(result)):
            assert bool(((value.T == 0).reshape(-1, 4).sum(dim=1) == 2).all())
    assert json.loads((result.path / masks.FILE).read_text())["mask_structure"] == "2:4"


def test_global_pruning_compares_all_layers(new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = dense("Llama")
    model.model.layers[0].mlp.up_proj.weight.data *= 100
    config = Config(**QUICK, importance="magnitude", global_pruning=True, sparsity=0.3)
    result = run(saved(model, tmp_path), config, new_context())
    rows = {row["name"]: row for row in result.details["layers"]}
    assert rows["model.layers.0.mlp.up_proj"]["zeros"] < 0.01
    assert result.details["zeros"] == pytest.approx(0.3, abs=1e-3)
    everything = torch.cat(
        [dense("Llama").get_submodule(n).weight.abs().reshape(-1) for n in rows if "0.mlp.up" not in n]
    )
    kept = [
        after[after != 0].abs().min() for key, after in tensors(result).items() if key.removesuffix(".weight") in rows
    ]
    assert min(kept) >= everything.sort().values[int(0.3 * len(everything))]
    assert apply_to(model, config) == result.details["layers"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_killed_run_goes_on_to_the_same_bytes(
    in_memory: bool, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense("Llama", num_hidden_layers=3), tmp_path / "source")
    settings = {**QUICK, "threads": 2}
    whole = run(source, Config(**settings), new_context())
    config = Config(**settings, activations_mb=2048 if in_memory else 0)
    with pytest.raises(Killed):
        run(source, config, new_context(scratch=tmp_path / "scratch", progress=Watch(kill_at=2)))
    watch = Watch()
    resumed = run(source, config, new_context(scratch=tmp_path / "scratch", progress=watch))
    assert watch.seen == [3]
    assert resumed.digest == whole.digest


@pytest.mark.parametrize("importance", METHODS)
def test_shards_in_bfloat16_stay_bfloat16(importance: Any, new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = dense("Llama").to(torch.bfloat16)
    config = Config(**QUICK, importance=importance)
    whole = run(saved(model, tmp_path / "whole"), config, new_context())
    parts = saved(model, tmp_path / "parts", max_shard_size="20KB")
    assert len(list(parts.path.glob("*.safetensors"))) > 2
    assert run(parts, config, new_context()).digest == whole.digest
    assert {value.dtype for value in tensors(whole).values()} == {torch.bfloat16}
    assert masks.sparsity(whole) == 0.5


def test_globs_choose_layers(new_context: Callable[..., Context], tmp_path: Path) -> None:
    source = saved(dense("Llama"), tmp_path)
    for importance in METHODS:
        config = Config(**QUICK, importance=importance, targets=("*.mlp.*",), ignore=("*.1.mlp.down_proj",))
        result = run(source, config, new_context())
        assert sorted(masks.pruned_layers(result)) == [
            f"model.layers.{layer}.mlp.{name}_proj"
            for layer, name in ((0, "down"), (0, "gate"), (0, "up"), (1, "gate"), (1, "up"))
        ]
        assert "model.layers.1.mlp.down_proj" in result.details["kept"]
        with pytest.raises(StageError, match="`targets` 'lm_head' matches no linear layer"):
            run(source, Config(**QUICK, importance=importance, targets=("lm_head",)), new_context())


@pytest.mark.parametrize("importance", METHODS)
def test_a_width_that_the_pattern_does_not_divide_is_named(
    importance: Any, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense("Llama", intermediate_size=90), tmp_path)
    config = Config(**QUICK, importance=importance, mask_structure="2:4")
    with pytest.raises(StageError, match=r"2:4 does not divide the inputs of model\.layers\.0\.mlp\.down_proj \(90\)"):
        run(source, config, new_context())


def test_inputs_that_are_no_numbers_are_told(new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = dense("Llama", tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[5] = torch.nan
    watch = Watch()
    result = run(saved(model, tmp_path / "some"), Config(**QUICK), new_context(progress=watch))
    assert any("no finite numbers" in warning for warning in watch.warnings)
    assert result.details["layers"][0]["dropped_tokens"] > 0
    model.model.embed_tokens.weight.data[:] = torch.nan
    with pytest.raises(StageError, match=r"no input of model\.layers\.0\.self_attn\.q_proj is a finite number"):
        run(saved(model, tmp_path / "all"), Config(**QUICK), new_context())


def test_what_is_quantised_already_is_refused(new_context: Callable[..., Context], tmp_path: Path) -> None:
    once = gptq.run(saved(dense("Llama"), tmp_path), gptq.Config(**QUICK, group_size=32), new_context())
    with pytest.raises(StageError, match=r"quantised already \(gptq\)"):
        run(once, Config(**QUICK), new_context())


def test_a_stack_of_two_kinds_is_pruned_by_magnitude(new_context: Callable[..., Context], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96)
        source = saved(transformers.T5ForConditionalGeneration(config), tmp_path)
    result = run(source, Config(**QUICK, importance="magnitude"), new_context())
    assert result.details["zeros"] == 0.5
    assert {name.split(".")[0] for name in masks.pruned_layers(result)} == {"encoder", "decoder"}
    transformers.T5ForConditionalGeneration.from_pretrained(result.path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_structure": "4:4"}, "leaves nothing"),
        ({"mask_structure": "2:4", "sparsity": 0.6}, "is a sparsity of 0.5"),
        ({"mask_structure": "two"}, "mask_structure"),
        ({"global_pruning": True}, "global_pruning is for importance: magnitude"),
        ({"global_pruning": True, "importance": "magnitude", "mask_structure": "2:4"}, "no say in an N:M pattern"),
        ({"sparsity": 1}, "sparsity"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**settings)


def test_what_calibration_can_not_serve_is_said_when_a_recipe_is_read(pico_vit: Artifact, pico_images: Path) -> None:
    recipe = {
        "version": 1,
        "name": "images",
        "model": {"source": str(pico_vit.path), "task": "image-classification"},
        "data": {"source": str(pico_images)},
        "stages": [{"prune": "unstructured", "importance": "wanda"}],
    }
    with pytest.raises(RecipeError, match="magnitude serves it"):
        load(recipe)
    recipe["stages"] = [{"prune": "unstructured", "importance": "magnitude"}]
    assert load(recipe).stages[0].config.importance == "magnitude"


def test_a_vision_transformer_is_pruned_by_magnitude(pico_vit: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_vit, Config(**QUICK, importance="magnitude"), new_context())
    assert masks.sparsity(result) == 0.5


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "sparsegpt"])
def test_layers_have_sparsities_of_their_own(
    importance: Any, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense("Llama"), tmp_path)
    own = {"model.layers.0.*": {"sparsity": 0.25}, "model.layers.1.mlp.up_proj": {"sparsity": 0}}
    result = run(source, Config(**QUICK, importance=importance, sparsity=0.5, layers=own), new_context())
    for row in result.details["layers"]:
        first, dense_one = ".0." in row["name"], row["name"] == "model.layers.1.mlp.up_proj"
        assert row["zeros"] == pytest.approx(0.25 if first else 0 if dense_one else 0.5, abs=0.02)
    with pytest.raises(ValueError, match="mask_structure 2:4 says how much every layer loses"):
        Config(mask_structure="2:4", layers={"*": {"sparsity": 0.1}})
    with pytest.raises(StageError, match="`layers` 'head' matches no linear layer"):
        run(source, Config(**QUICK, importance=importance, layers={"head": {"sparsity": 0.1}}), new_context())
