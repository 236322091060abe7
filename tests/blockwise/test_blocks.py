"""Blocks: found in any model, run one at a time with the model's own results, and empty before and after."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from optimize.artifact import Artifact
from optimize.blockwise import lazy_weights
from optimize.blockwise.blocks import Blocks, find_blocks, shared_inputs
from optimize.blockwise.finished import Finished
from optimize.blockwise.forwards import Forwards
from optimize.blockwise.lazy_weights import checkpoint_tensors, stored, write_checkpoint
from optimize.errors import StageError
from optimize.quantize.checkpoint import empty_model

CPU = torch.device("cpu")
DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
OLDER = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "Mistral": ("ForCausalLM", DECODER | {"sliding_window": 8}),
    "Qwen2": ("ForCausalLM", DECODER | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "Qwen3": ("ForCausalLM", DECODER | {"head_dim": 32}),
    "Gemma": ("ForCausalLM", DECODER | {"head_dim": 32}),
    "Gemma2": ("ForCausalLM", DECODER | {"head_dim": 32, "sliding_window": 8}),
    "GPT2": ("LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "OPT": ("ForCausalLM", OLDER | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "GPTNeoX": ("ForCausalLM", OLDER),
    "Bert": ("ForSequenceClassification", OLDER),
}
"""Name -> (ending of the class's name, config); no two kinds of decoders call their blocks alike."""


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Artifact]:
    """A pico model with random weights, and the same as an artifact."""
    ending, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name + ending)(getattr(transformers, f"{name}Config")(**config))
    model.eval().to(dtype).save_pretrained(folder, **options)
    return model, Artifact.from_directory(folder, format="transformers", task={"name": "causal-lm"})


def blocks_of(artifact: Artifact, compute_dtype: torch.dtype | None = None) -> Blocks:
    model = empty_model(artifact, json.loads((artifact.path / "config.json").read_text()))
    return Blocks(model, checkpoint_tensors(artifact.path, model), compute_dtype=compute_dtype)


def inputs(rows: int = 2, padding: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(3, 96, (rows, 20))
    mask = np.ones_like(ids)
    mask[-1, 20 - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def materialised(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_the_whole_model_gives(name: str, tmp_path: Path) -> None:
    dense, artifact = saved(name, tmp_path)
    batch = inputs(padding=5)
    found: list[Any] = []
    for block in dense.get_submodule(find_blocks(dense)):
        block.register_forward_hook(lambda module, args, result: found.append(result))
    with torch.no_grad():
        dense(**{key: torch.from_numpy(value) for key, value in batch.items()})
    blocks = blocks_of(artifact)
    with blocks.opened(CPU):
        with blocks.embedding():
            hidden = blocks.embed(batch)
        for index, theirs in enumerate(found):
            with blocks.filled(index):
                hidden = blocks.run(index, batch, hidden)
            assert torch.equal(hidden, theirs[0] if isinstance(theirs, tuple) else theirs)
    assert len(found) == 3


def test_only_what_is_needed_is_in_memory(tmp_path: Path) -> None:
    dense, artifact = saved("Llama", tmp_path)
    blocks = blocks_of(artifact)
    layer = sum(parameter.numel() for parameter in dense.model.layers[0].parameters())
    embedding, norm = dense.model.embed_tokens.weight.numel(), dense.model.norm.weight.numel()
    assert materialised(blocks.model) == 0
    with blocks.opened(CPU):
        assert materialised(blocks.model) == norm
        with blocks.embedding():
            hidden = blocks.embed(inputs())
            assert materialised(blocks.model) == norm + embedding
        for index in range(3):
            with blocks.filled(index):
                hidden = blocks.run(index, inputs(), hidden)
                assert materialised(blocks.model) == norm + layer
    assert materialised(blocks.model) == 0


def test_layers_multiply_in_what_they_are_told_and_add_up_in_float32(tmp_path: Path) -> None:
    _, artifact = saved("Llama", tmp_path)
    seen: dict[Any, Any] = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        blocks = blocks_of(artifact, dtype)
        with blocks.opened(CPU):
            with blocks.embedding():
                hidden = blocks.embed(inputs())
            with blocks.filled(0):
                layer = blocks.model.model.layers[0].mlp.down_proj
                layer.register_forward_hook(lambda module, args, result: seen.update(product=result.dtype))
                seen[dtype] = blocks.run(0, inputs(), hidden)
                assert seen["product"] == (dtype or torch.float32)
                assert seen[dtype].dtype == torch.float32
    assert torch.equal(seen[None], seen[torch.float32])
    assert 0 < (seen[None] - seen[torch.bfloat16]).abs().max() < 0.02 * seen[None].abs().max()


def test_weights_of_another_type_are_read_as_they_are(tmp_path: Path) -> None:
    dense, artifact = saved("Llama", tmp_path, torch.bfloat16)
    blocks = blocks_of(artifact)
    name = "model.layers.1.mlp.up_proj.weight"
    with blocks.opened(CPU), blocks.filled(1):
        assert blocks.model.get_parameter(name).dtype == torch.float32
        assert torch.equal(blocks.original(name), dense.get_parameter(name).float())


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_checkpoint_of_the_bare_model_and_of_several_files_is_read(shard: str, tmp_path: Path) -> None:
    dense, _ = saved("GPT2", tmp_path / "whole")
    dense.transformer.save_pretrained(tmp_path / "bare", max_shard_size=shard)
    empty = empty_model(
        Artifact.from_directory(tmp_path / "whole", format="transformers", task={}),
        json.loads((tmp_path / "whole" / "config.json").read_text()),
    )
    tensors = checkpoint_tensors(tmp_path / "bare", empty)
    assert (len({tensor.file for tensor in tensors.values()}) > 1) == (shard == "20KB")
    assert tensors.keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert torch.equal(tensors[name].load(), value)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    _, artifact = saved("Llama", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.1.mlp.up" not in name}, path)
    blocks = blocks_of(artifact)
    missing = pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj\.weight are missing")
    with blocks.opened(CPU), missing, blocks.filled(1):
        pass


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))


class Stack(nn.Module):
    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()])
        self.layers = nn.ModuleList(members)


def test_the_outermost_list_of_one_kind_is_found() -> None:
    assert find_blocks(Stack([Experts(), Experts()])) == "layers"
    with pytest.raises(StageError, match="Stack has no list of blocks"):
        find_blocks(Stack([nn.Linear(4, 4), nn.ReLU()]))
    with torch.device("meta"):
        both = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, num_layers=2, d_ff=8))
    with pytest.raises(StageError, match="no list of blocks"):
        find_blocks(both)


def test_a_model_that_does_not_run_through_its_blocks_in_order_is_refused(tmp_path: Path) -> None:
    model, _ = saved("Llama", tmp_path)
    blocks = Blocks(model, None)
    run = model.model.forward
    model.model.forward = lambda **given: [model.model.layers[1](torch.zeros(1, 2, 64)), run(**given)]
    with blocks.opened(CPU), pytest.raises(StageError, match=r"does not run through model\.layers in order"):
        blocks.run(1, inputs(), torch.zeros(2, 20, 64))


def test_modules_with_the_same_input_are_found_in_the_order_they_run() -> None:
    a, b, c, d = (nn.Linear(4, 4) for _ in range(4))
    x = torch.randn(2, 4)

    def forward() -> None:
        y = b(x) + c(x)
        d(y)
        a(x)

    assert shared_inputs({"a": a, "b": b, "c": c, "d": d, "e": nn.Linear(4, 4)}, forward) == [["b", "c", "a"], ["d"]]


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.usefixtures("no_thread_is_left")
def test_passes_see_the_weights_of_layers_changed_while_they_wait(paused: bool) -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    xs = [torch.randn(3, 4) for _ in range(3)]
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def run(batch: int) -> torch.Tensor:
        with torch.no_grad():
            return second(first(xs[batch]))

    def look(batch: int, layer: int, x: torch.Tensor) -> None:
        seen[batch, layer] = x

    forwards = Forwards(run, 3, paused=paused)
    forwards.reach([first], look)
    assert all(seen[batch, 0] is xs[batch] for batch in range(3))
    first.weight.data *= 2
    forwards.reach([second], look)
    assert all(torch.equal(seen[batch, 0], first(xs[batch])) for batch in range(3))
    second.weight.data *= 3
    for x, output in zip(xs, forwards.finish(), strict=True):
        assert torch.equal(output, second(first(x)))
    forwards.close()


@pytest.mark.usefixtures("no_thread_is_left")
def test_an_error_in_a_paused_pass_is_raised_and_the_others_are_given_up() -> None:
    layer = nn.Linear(4, 4)

    def run(batch: int) -> torch.Tensor:
        result: torch.Tensor = layer(torch.ones(1, 4))
        if batch == 1:
            raise ValueError("batch 1")
        return result

    forwards = Forwards(run, 3, paused=True)
    forwards.reach([layer], lambda *_: None)
    with pytest.raises(ValueError, match="batch 1"):
        list(forwards.finish())
    forwards.close()


@pytest.mark.parametrize("in_memory", [True, False])
def test_steps_are_found_again_and_what_was_cut_short_is_not(in_memory: bool, tmp_path: Path) -> None:
    finished = Finished(tmp_path, in_memory=in_memory, device=CPU)
    finished.add(iter([torch.zeros(1, 2, 4), torch.ones(1, 2, 4)]), {}, {"step": 0})
    finished.add(iter([torch.full((1, 2, 4), 2.0)]), {"a.weight": torch.arange(3)}, {"step": 1})

    def cut_short() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 2, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished.add(cut_short(), {}, {"step": 2})
    again = Finished(tmp_path, in_memory=in_memory, device=CPU)
    assert again.count == 2
    assert again.facts() == [{"step": 0}, {"step": 1}]
    assert torch.equal(again.hidden(0), torch.full((1, 2, 4), 2.0))
    assert torch.equal(again.tensors()["a.weight"].load(), torch.arange(3))
    assert sorted(path.name for path in tmp_path.glob("*/outputs")) == ["outputs"]  # the last step's alone


@pytest.mark.parametrize("limit", [None, 100])
def test_a_checkpoint_is_written_as_safetensors_reads_it(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(7).to(torch.bfloat16),
        "wide": torch.randn(5, 3),
        "whole": torch.arange(4),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    if limit:
        monkeypatch.setattr(lazy_weights, "_SHARD_BYTES", limit)
    folder = tmp_path / "made"
    folder.mkdir()
    write_checkpoint(folder, stored(tmp_path / "source.safetensors"))
    places = dict.fromkeys(tensors, "model.safetensors")
    if limit:
        places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert sorted(set(places.values())) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, value in tensors.items():
        with safe_open(folder / places[name], "pt") as file:
            assert torch.equal(file.get_tensor(name), value)
