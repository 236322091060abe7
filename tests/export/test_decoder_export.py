"""Export of language models: the same answers at once, padded and through the cache, on a checkpoint's own codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import transformers
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import Data, prepare
from optimize.errors import EvaluationError, StageError
from optimize.export import decoder
from optimize.export.onnx import Config, run
from optimize.quantize import gptq_format
from optimize.quantize.gptq_grid import Grid, round_to_nearest
from optimize.runtimes import onnx as runtime
from optimize.source import vetting
from optimize.work import Work

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEC = {"name": "causal-lm", "context_length": 64, "stride": 64, "separator": "\n"}
Make = Callable[[], Context]


@pytest.fixture(scope="module")
def context(pico_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    task = tasks.get("causal-lm")
    config = task.Data(source=str(pico_corpus), context_length=64, splits={"validation": 0.5, "evaluation": 0.5})
    rows = prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_corpus.parent).for_stages()

    def make() -> Context:
        scratch = tmp_path_factory.mktemp("scratch")
        return Context(tmp_path_factory.mktemp("artifact"), scratch, task, rows, scratch / "logs", stage="stage")

    return make


def checkpoint(source: Path, folder: Path, grids: dict[str, Grid], shuffled: str = "") -> Artifact:
    """A GPTQ checkpoint of the pico Llama by rounding to nearest; the layers named `shuffled` with act-order."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.split(".")[-2] in LAYERS]:
        layer, grid = name.removesuffix(".weight"), grids[name.split(".")[-2]]
        weight = tensors.pop(name)
        order = torch.arange(weight.shape[1])
        if shuffled and layer.endswith(shuffled):
            order = torch.randperm(weight.shape[1], generator=generator)
        quantized = round_to_nearest(weight[:, order], grid)
        back = torch.argsort(order)
        quantized = replace(quantized, codes=quantized.codes[:, back], group_of=quantized.group_of[back])
        tensors |= {f"{layer}.{end}": value for end, value in gptq_format.pack(quantized, grid.bits).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(source)
    config.quantization_config = gptq_format.quantization_config(
        next(iter(grids.values())), damp_percent=0.01, desc_act=False, static_groups=True, true_sequential=True
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return Artifact.from_directory(folder, format="transformers", task=SPEC)


def one_grid(bits: int, group_size: int, sym: bool = False) -> dict[str, Grid]:
    return dict.fromkeys(LAYERS, Grid(bits, group_size, sym))


@pytest.fixture(scope="module")
def parent(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return checkpoint(pico_llama, tmp_path_factory.mktemp("gptq") / "model", one_grid(4, 32), shuffled="down_proj")


SETTINGS = Config(lm_head="int8", float_activations=("*.down_proj", "*.layers.0.self_attn.*"))


@pytest.fixture(scope="module")
def exported(parent: Artifact, context: Make) -> Artifact:
    return run(parent, SETTINGS, context())


def test_the_details_say_what_was_checked_and_how_codes_lie(exported: Artifact) -> None:
    details = exported.details
    assert details["max_difference"] < 1e-5 <= details["tolerance"]
    assert 0 < details["divergence"] < 0.05
    assert details["checked"] == {"split": "validation", "windows": [64, 5, 21]}
    assert details["operators"] == {
        "GatherBlockQuantized": 1,
        "GroupQueryAttention": 2,
        "MatMulNBits": 9,
        "SkipSimplifiedLayerNormalization": 4,
    }
    assert (details["bits"], details["stored_bits"], details["block_size"], details["permuted"]) == ([4], [4], [32], 2)


def test_the_graph_holds_the_codes_of_the_checkpoint(exported: Artifact, parent: Artifact) -> None:
    graph = onnx.load(exported.path / "model.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    joined = next(node for node in graph.node if "layers.1.self_attn.q_proj" in node.name)
    codes, scales, zeros = (weights[name] for name in joined.input[1:4])
    expected = [gptq_format.load_layer(parent.path, f"model.layers.1.self_attn.{name}_proj") for name in "qkv"]
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    np.testing.assert_array_equal(nibbles, torch.cat([layer.codes for layer in expected]).numpy())
    np.testing.assert_array_equal(scales, torch.cat([layer.scales for layer in expected]).numpy())
    halves = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, : scales.shape[1]]
    np.testing.assert_array_equal(halves, torch.cat([layer.zeros for layer in expected]).numpy())


def test_head_and_embedding_are_one_matrix(exported: Artifact) -> None:
    graph = onnx.load(exported.path / "model.onnx").graph
    (embedding,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    (head,) = (node for node in graph.node if "logits" in node.output)
    assert embedding.input[0] == head.input[1]
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    # The norms of the pico model are all the same and lie in the file once.
    assert runtime.parameters(exported.path) == 320 * 64 + 2 * layer + 64


def test_the_file_is_plain_and_the_same_again(exported: Artifact, parent: Artifact, context: Make) -> None:
    assert run(parent, SETTINGS, context()).digest == exported.digest
    vetting.check_graph("it", exported.path, exported.files)
    content = (exported.path / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(exported.path.parent).encode() not in content
    assert "quantization_config" not in (exported.path / "config.json").read_text()
    names = {node.name for node in onnx.load(exported.path / "model.onnx").graph.node}
    assert "model.model.layers.1.mlp.down_proj/MatMulNBits" in names


def test_a_decoder_steps_through_its_cache(exported: Artifact) -> None:
    runner = runtime.open(exported.path, threads=1)
    ids = np.random.default_rng(0).integers(0, 320, 40)
    whole = runner.run({"input_ids": ids[None], "attention_mask": np.ones((1, 40), np.int64)})["logits"][0]
    sequence = runner.decoder(40)
    scale = np.abs(whole).max()
    for start, end in [(0, 30), (30, 31), (31, 40)]:
        # Kernels for one token and for many round activations differently.
        assert np.abs(sequence.forward(ids[start:end]) - whole[end - 1]).max() < 0.03 * scale
        assert sequence.length == end
    with pytest.raises(EvaluationError, match="41 tokens does not fit in 40"):
        sequence.forward(ids[:1])
    sequence.truncate(4)
    assert sequence.length == 4
    assert np.abs(sequence.forward(ids[4:12]) - whole[11]).max() < 0.03 * scale


def test_rows_are_padded_on_the_right_or_refused(exported: Artifact) -> None:
    runner = runtime.open(exported.path, threads=1)
    ids = np.random.default_rng(0).integers(0, 320, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    both = runner.run({"input_ids": ids, "attention_mask": mask})["logits"]
    alone = runner.run({"input_ids": ids[1:, :6], "attention_mask": mask[1:, :6]})["logits"]
    np.testing.assert_allclose(both[1, :6], alone[0], atol=1e-4)
    with pytest.raises(EvaluationError, match="padded on the right"):
        runner.run({"input_ids": ids, "attention_mask": mask[:, ::-1]})


def test_other_answers_are_an_error(exported: Artifact, context: Make) -> None:
    graph, windows = onnx_ir.load(exported.path / "model.onnx"), [np.arange(length) for length in (20, 5, 9)]
    wrong = [np.ones((len(window), 320), np.float32) for window in windows]
    with pytest.raises(StageError, match="answers differently from its parent for a window alone: by "):
        decoder._compare_exactly(graph, windows, wrong, 1e-4, context())


def test_layers_can_keep_their_inputs_in_float(exported: Artifact, parent: Artifact, context: Make) -> None:
    graph = onnx.load(exported.path / "model.onnx").graph
    levels = {
        node.name.split("layers.")[1].split("/")[0]: next(a.i for a in node.attribute if a.name == "accuracy_level")
        for node in graph.node
        if node.op_type == "MatMulNBits" and "layers." in node.name
    }
    assert [name for name, level in sorted(levels.items()) if level == 1] == [
        "0.mlp.down_proj",
        "0.self_attn.o_proj",
        "0.self_attn.q_proj.whole",
        "1.mlp.down_proj",
    ]
    with pytest.raises(StageError, match="`float_activations` 'nothing' matches no layer on codes"):
        run(parent, Config(float_activations=("nothing",)), context())


def test_without_rows_it_refuses(pico_llama: Path, context: Make, tmp_path: Path) -> None:
    parent = Artifact.from_directory(pico_llama, format="transformers", task=SPEC)
    with pytest.raises(StageError, match="nothing to check the export with"):
        run(parent, Config(), replace(context(), data=Data(tmp_path, {}, {"train": 8})))


def test_layers_may_have_widths_of_their_own(pico_llama: Path, context: Make, tmp_path: Path) -> None:
    grids = one_grid(4, 32) | {"q_proj": Grid(8, 32, False), "down_proj": Grid(2, 32, False)}
    made = run(checkpoint(pico_llama, tmp_path / "model", grids), Config(float_activations=("*",)), context())
    assert made.details["bits"] == [2, 4, 8]
    assert made.details["max_difference"] < 1e-4  # from what the very codes stand for
