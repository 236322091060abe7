"""`quantize: gptq`: never worse than rounding to nearest, the same bytes after a kill, clear words where it can't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.progress import Progress
from optimize.quantize import gptq
from optimize.quantize.checkpoint import linear_layers
from optimize.quantize.gptq import Config, apply_to, run
from optimize.quantize.gptq_format import load_layer, quantized_layers
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
    "Qwen2": ("ForCausalLM", DECODER),
    "Qwen3": ("ForCausalLM", DECODER | {"head_dim": 32}),
    "GPT2": ("LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPTNeoX": ("ForCausalLM", OLDER),
    "Bert": ("ForSequenceClassification", OLDER),
}
QUICK: dict[str, Any] = {"group_size": 32, "compute_dtype": "float32", "device": "cpu", "threads": 1}


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


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """Three batches of four rows; the last row of the first one is padded."""
    draw = np.random.default_rng(0)
    made = [{"input_ids": draw.integers(3, 96, (4, 24)), "attention_mask": np.ones((4, 24), int)} for _ in range(3)]
    made[0]["attention_mask"][-1, 16:] = 0
    monkeypatch.setattr(gptq, "calibration_batches", lambda *_: made)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_is_worse_than_rounding_to_nearest(
    name: str, batches: list[Inputs], new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense(name), tmp_path)
    result = run(source, Config(**QUICK), new_context())
    rows = {row["name"]: row for row in result.details["layers"]}
    assert sorted(rows) == quantized_layers(result.path)
    assert all(0 < row["error"] <= row["rtn_error"] for row in rows.values())
    assert result.details["summary"]["worst_ratio"] <= 1
    assert result.details["summary"]["mean_ratio"] < 0.8
    # The same in memory: what the artifact holds is what the blocks after a layer were shown.
    model = dense(name)
    assert apply_to(model, Config(**QUICK), batches) == result.details["layers"]
    for layer, module in linear_layers(model).items():
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        if layer in rows:
            assert torch.equal(load_layer(result.path, layer).dequantize(), weight)
    # All else is as it was.
    with (
        safe_open(source.path / "model.safetensors", "pt") as old,
        safe_open(result.path / "model.safetensors", "pt") as new,
    ):
        for key in set(old.keys()):
            if key.removesuffix(".weight") not in rows:
                assert torch.equal(old.get_tensor(key), new.get_tensor(key))
    assert "model.safetensors" in result.files
    assert set(source.files) | {"quantize_config.json"} == set(result.files)


def test_the_error_is_that_of_the_layers_output(
    batches: list[Inputs], new_context: Callable[..., Context], tmp_path: Path
) -> None:
    result = run(saved(dense("Qwen2"), tmp_path), Config(**QUICK), new_context())
    original, rounded = dense("Qwen2"), dense("Qwen2")
    order = [row["name"] for row in result.details["layers"]]
    assert [name.split(".")[-1] for name in order[-7:]][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    last = order[-1]
    for name in order[:-1]:
        rounded.get_submodule(name).weight.data = load_layer(result.path, name).dequantize()
    shown: list[torch.Tensor] = []
    rounded.get_submodule(last).register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    for batch in batches:
        with torch.no_grad():
            rounded(**{key: torch.from_numpy(value) for key, value in batch.items()})
        shown[-1] = shown[-1][torch.from_numpy(batch["attention_mask"]) != 0]  # padding does not count
    x, weight = torch.cat(shown), original.get_submodule(last).weight
    lost = x @ (weight - load_layer(result.path, last).dequantize()).T
    error = lost.square().sum() / (x @ weight.T).square().sum()
    assert result.details["layers"][-1]["error"] == pytest.approx(error.item(), rel=2e-3)


class Killed(BaseException):
    """Stands for a signal: nothing in the stage catches it."""


class Watch(Progress):
    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[float] = []
        self.warnings: list[str] = []

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        assert total >= done
        assert text.startswith(f"block {done} of {total}, about ")
        self.seen.append(done)
        if done == self.kill_at:
            raise Killed

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.usefixtures("batches")
def test_a_killed_run_goes_on_to_the_same_bytes(
    in_memory: bool, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense("Llama", num_hidden_layers=3), tmp_path / "source")
    whole = run(source, Config(**QUICK), new_context())
    config = Config(**{**QUICK, "threads": 2}, activations_mb=2048 if in_memory else 0)
    with pytest.raises(Killed):
        run(source, config, new_context(scratch=tmp_path / "scratch", progress=Watch(kill_at=2)))
    (tmp_path / "scratch" / "blocks" / ".00003.1-0.tmp").mkdir()  # cut short
    watch = Watch()
    resumed = run(source, config, new_context(scratch=tmp_path / "scratch", progress=watch))
    assert watch.seen == [3]
    assert resumed.digest == whole.digest


@pytest.mark.usefixtures("batches")
def test_shards_and_other_types_give_their_own_floats(new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = dense("Llama").to(torch.bfloat16)
    whole = run(saved(model, tmp_path / "whole"), Config(**QUICK), new_context())
    parts = saved(model, tmp_path / "parts", max_shard_size="20KB")
    assert len(list(parts.path.glob("*.safetensors"))) > 2
    assert run(parts, Config(**QUICK), new_context()).digest == whole.digest
    with safe_open(whole.path / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert run(parts, Config(**{**QUICK, "compute_dtype": "bfloat16"}), new_context()).digest != whole.digest


def test_what_padding_holds_does_not_matter(
    batches: list[Inputs], new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense("Bert"), tmp_path)
    first = run(source, Config(**QUICK), new_context())
    batches[0]["input_ids"][-1, 16:] = 7
    assert run(source, Config(**QUICK), new_context()).digest == first.digest
    batches[0]["input_ids"][-1, :16] = 7
    assert run(source, Config(**QUICK), new_context()).digest != first.digest


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_grids(bits: int, new_context: Callable[..., Context], tmp_path: Path) -> None:
    source = saved(dense("Llama"), tmp_path)
    config = Config(**{**QUICK, "group_size": -1}, bits=bits, sym=False, true_sequential=False, desc_act=False)
    result = run(source, config, new_context())
    assert all(row["ratio"] <= 1 for row in result.details["layers"])
    described = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert described == json.loads((result.path / "quantize_config.json").read_text())
    assert {"bits": bits, "group_size": -1, "sym": False, "true_sequential": False}.items() <= described.items()


@pytest.mark.usefixtures("batches")
def test_globs_choose_layers(new_context: Callable[..., Context], tmp_path: Path) -> None:
    source = saved(dense("Llama"), tmp_path)
    config = Config(**QUICK, targets=("*.mlp.*",), ignore=("*.1.mlp.down_proj",))
    result = run(source, config, new_context())
    assert quantized_layers(result.path) == [
        f"model.layers.{layer}.mlp.{name}_proj"
        for layer, name in ((0, "down"), (0, "gate"), (0, "up"), (1, "gate"), (1, "up"))
    ]
    assert "model.layers.1.mlp.down_proj" in result.details["kept"]
    for knob in ("targets", "ignore"):
        with pytest.raises(StageError, match=f"`{knob}` 'lm_head' matches no linear layer"):
            run(source, Config(**QUICK, **{knob: ("lm_head",)}), new_context())
    with pytest.raises(StageError, match="no linear layer is left"):
        run(source, Config(**QUICK, ignore=("*",)), new_context())


@pytest.mark.parametrize(("name", "embedding"), [("Llama", "model.embed_tokens"), ("GPT2", "transformer.wte")])
@pytest.mark.usefixtures("batches")
def test_a_tied_head_is_quantised_and_the_embedding_is_not(
    name: str, embedding: str, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    model = dense(name)
    watch = Watch()
    result = run(saved(model, tmp_path), Config(**QUICK, lm_head=True), new_context(progress=watch))
    assert watch.seen == [1, 2, 3]
    assert "lm_head" in quantized_layers(result.path)
    config = json.loads((result.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["lm_head"] is True
    with safe_open(result.path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(f"{embedding}.weight"), model.lm_head.weight)
        assert "lm_head.weight" not in set(file.keys())


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        (
            {},
            {"group_size": 64},
            r"group_size 64 does not divide the inputs of model\.layers\.0\.mlp\.down_proj \(96 inputs",
        ),
        ({"intermediate_size": 40}, {"group_size": -1}, r"multiples of 32.*gate_proj \(64 inputs, 40 outputs\)"),
    ],
)
@pytest.mark.usefixtures("batches")
def test_widths_that_do_not_fit_are_named(
    changes: dict[str, Any], config: dict[str, Any], message: str, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    source = saved(dense("Llama", **changes), tmp_path)
    watch = Watch()
    with pytest.raises(StageError, match=message) as error:
        run(source, Config(**{**QUICK, **config}), new_context(progress=watch))
    assert "group_size can be -1" in (error.value.hint or "")
    assert watch.seen == []


@pytest.mark.usefixtures("batches")
def test_what_is_quantised_already_is_refused(new_context: Callable[..., Context], tmp_path: Path) -> None:
    once = run(saved(dense("Llama"), tmp_path), Config(**QUICK), new_context())
    with pytest.raises(StageError, match=r"quantised already \(gptq\)"):
        run(once, Config(**QUICK), new_context())


@pytest.mark.usefixtures("batches")
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


@pytest.mark.usefixtures("batches")
def test_dead_inputs_are_told(new_context: Callable[..., Context], tmp_path: Path) -> None:
    model = dense("Llama")
    model.model.layers[0].input_layernorm.weight.data[3:6] = 0
    watch = Watch()
    result = run(saved(model, tmp_path), Config(**QUICK), new_context(progress=watch))
    assert result.details["layers"][0]["dead_inputs"] == 3
    assert any("were 0 on all calibration rows" in warning for warning in watch.warnings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("batches")
def test_a_gpu_gives_no_worse_layers(new_context: Callable[..., Context], tmp_path: Path) -> None:
    result = run(saved(dense("Llama"), tmp_path), Config(**{**QUICK, "device": "cuda"}), new_context())
    assert all(row["error"] <= row["rtn_error"] for row in result.details["layers"])


MIXED: dict[str, Any] = {
    "model.layers.0.*": {"bits": 8},
    "model.layers.1.mlp.down_proj": {"bits": 2, "group_size": -1},
    "model.layers.1.self_attn.k_proj": {"bits": 3},
}


def test_layers_have_widths_of_their_own(
    batches: list[Inputs], new_context: Callable[..., Context], tmp_path: Path
) -> None:
    from optimize.runtimes import transformers as runtime

    source = saved(dense("Llama"), tmp_path)
    result = run(source, Config(**QUICK, layers=MIXED), new_context())
    rows = {row["name"]: row["bits"] for row in result.details["layers"]}
    assert {rows[name] for name in rows if ".0." in name} == {8}
    assert rows["model.layers.1.mlp.down_proj"] == 2
    assert rows["model.layers.1.self_attn.k_proj"] == 3
    assert rows["model.layers.1.self_attn.q_proj"] == 4
    sizes = {name: dense("Llama").get_submodule(name).weight.numel() for name in rows}
    mean = sum(rows[name] * count for name, count in sizes.items()) / sum(sizes.values())
    assert result.details["mean_bits"] == pytest.approx(mean, rel=1e-3)
    assert runtime.parameters(result.path) == runtime.parameters(source.path)
    # In memory the same, and of a layer what a uniform stage of that width gives where its inputs are the same.
    model = dense("Llama")
    assert apply_to(model, Config(**QUICK, layers=MIXED), batches) == result.details["layers"]
    for name in rows:
        assert torch.equal(load_layer(result.path, name).dequantize(), model.get_submodule(name).weight)
    eight = run(source, Config(**QUICK, bits=8), new_context())
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(load_layer(eight.path, first).codes, load_layer(result.path, first).codes)
    # GPTQModel reads the same from `dynamic` as we do from the shapes.
    described = json.loads((result.path / "quantize_config.json").read_text())
    dynamic = pytest.importorskip("gptqmodel.quantization.config").dynamic_get
    assert {name: dynamic(described["dynamic"], name, "bits", described["bits"]) for name in rows} == rows
    # The runtime's kernels (in float16 or so) answer like the de-quantised weights.
    answers = runtime.open(result.path, 1).run(batches[1])["logits"]
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in batches[1].items()}).logits.numpy()
    assert np.abs(answers - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.usefixtures("batches")
def test_what_layers_say_must_make_sense(new_context: Callable[..., Context], tmp_path: Path) -> None:
    source = saved(dense("Llama"), tmp_path)
    for layers, message in (
        ({"*.mlp.*": {"bits": 2}, "model.layers.0.*": {"bits": 8}}, r"two things of model\.layers\.0\.mlp"),
        ({"lm_head": {"bits": 8}}, "`layers` 'lm_head' matches no linear layer"),
        ({"*.down_proj": {"group_size": 64}}, r"group_size 64 does not divide .*down_proj"),
    ):
        with pytest.raises(StageError, match=message):
            run(source, Config(**QUICK, layers=layers), new_context())
    with pytest.raises(ValueError, match="say `bits`, `group_size` or both"):
        Config(layers={"*": {}})
    # A whole name goes before a glob, in whatever order they stand.
    own = {"model.layers.0.mlp.up_proj": {"bits": 2}, "model.layers.0.*": {"bits": 8}}
    grids = gptq.grids_of(
        ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"],
        Config(bits=3, layers=own),
    )
    assert [grid.bits for grid in grids.values()] == [2, 8, 3]
