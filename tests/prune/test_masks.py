"""Zeros that stay: through a second pruning, GPTQ, training and every quantiser whose grid has a 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.distill import finetune, training
from optimize.errors import StageError
from optimize.export import onnx as export
from optimize.prune import masks
from optimize.prune.unstructured import Config, run
from optimize.quantize import cast, gptq, int4_onnxruntime, int8_onnxruntime, int8_qat_onnxruntime
from optimize.quantize.gptq_format import load_layer
from optimize.source.folder import load_folder
from optimize.work import Work

QUICK: dict[str, Any] = {"device": "cpu", "threads": 1}
CALIBRATION = {"num_samples": 8, "max_length": 32}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def text_context(pico_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Context]:
    task = tasks.get("causal-lm")
    config = task.Data(source=str(pico_corpus), splits={"calibration": 0.5, "evaluation": 0.5}, context_length=32)
    rows = prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_corpus.parent).for_stages()

    def make() -> Context:
        directory, scratch = tmp_path_factory.mktemp("artifact"), tmp_path_factory.mktemp("scratch")
        return Context(directory, scratch, task, rows, scratch / "logs", stage="stage")

    return make


@pytest.fixture(scope="module")
def sparse_llama(pico_llama: Path, text_context: Callable[[], Context]) -> Artifact:
    """SparseGPT at one half."""
    spec = {"name": "causal-lm", "context_length": 32, "stride": 32}
    source = Artifact.from_directory(pico_llama, format="transformers", task=spec)
    return run(source, Config(**QUICK, calibration=CALIBRATION), text_context())


@pytest.fixture(scope="module")
def sparse_bert(pico_source: Artifact, new_context: Callable[..., Context]) -> Artifact:
    return run(pico_source, Config(**QUICK, importance="magnitude", mask_structure="2:4"), new_context())


def pruned(artifact: Artifact) -> dict[str, Tensor]:
    """Layer -> where its zeros are."""
    found = weights(artifact.path)
    return {name: found[f"{name}.weight"] == 0 for name in masks.pruned_layers(artifact)}


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 3, "sym": False}, {"bits": 2, "group_size": -1}])
def test_gptq_keeps_them(sparse_llama: Artifact, text_context: Callable[[], Context], settings: dict[str, Any]) -> None:
    config = gptq.Config(**QUICK, **{"group_size": 32, "calibration": CALIBRATION, **settings})
    result = gptq.run(sparse_llama, config, text_context())
    for name, zeros in pruned(sparse_llama).items():
        assert bool((load_layer(result.path, name).dequantize()[zeros] == 0).all())
    assert all(row["ratio"] < 1 for row in result.details["layers"])
    sparsity = masks.sparsity(result)
    assert sparsity is not None
    assert sparsity >= 0.5
    # Without the file they are weights like any other.
    rest = {name: entry for name, entry in sparse_llama.files.items() if name != masks.FILE}
    free = gptq.run(replace(sparse_llama, files=rest), config, text_context())
    kept = [load_layer(free.path, name).dequantize()[zeros] == 0 for name, zeros in pruned(sparse_llama).items()]
    assert float(torch.cat(kept).double().mean()) < 0.95


def test_training_keeps_them(sparse_bert: Artifact, new_context: Callable[..., Context]) -> None:
    config = finetune.Config(**QUICK, learning_rate=2e-3, batch_size=16, epochs=1, weight_decay=0.1)
    result = finetune.run(sparse_bert, config, new_context())
    before, after = weights(sparse_bert.path), weights(result.path)
    for name, zeros in pruned(sparse_bert).items():
        assert bool((after[f"{name}.weight"][zeros] == 0).all())
        assert int((after[f"{name}.weight"] == 0).sum()) == int(zeros.sum())
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert masks.pruned_layers(result) == masks.pruned_layers(sparse_bert)
    assert masks.sparsity(result) == 0.5
    # And a second one from there.
    again = finetune.run(result, config, new_context())
    assert masks.sparsity(again) == 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam"])
def test_no_optimiser_moves_them(optimizer: str, sparse_bert: Artifact) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(sparse_bert.path)
    masks.Held(sparse_bert, model)
    steps = {
        "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5),
        "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        "adam": lambda weights: torch.optim.Adam(weights, lr=0.1, amsgrad=True),
    }[optimizer](model.parameters())
    for _ in range(3):
        model(torch.tensor([[2, 7, 9, 3]]), labels=torch.tensor([1])).loss.backward()
        steps.step()
        steps.zero_grad()
    state = model.state_dict()
    for name, zeros in pruned(sparse_bert).items():
        assert bool((state[f"{name}.weight"][zeros] == 0).all())


def test_what_was_moved_without_a_gradient_is_put_back(sparse_bert: Artifact, tmp_path: Path) -> None:
    """As merged adapters do it."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(sparse_bert.path)
    held = masks.Held(sparse_bert, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    held.finish(model, tmp_path)
    state = model.state_dict()
    for name, zeros in pruned(sparse_bert).items():
        assert torch.equal(state[f"{name}.weight"] == 0, zeros)
    assert (tmp_path / masks.FILE).read_bytes() == (sparse_bert.path / masks.FILE).read_bytes()


def test_a_dense_model_is_left_alone(pico_source: Artifact, tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data[0] = 0
    held = masks.Held(pico_source, layer)
    layer(torch.ones(4)).sum().backward()
    assert layer.weight.grad is not None
    assert bool((layer.weight.grad[0] != 0).all())
    held.finish(layer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert masks.sparsity(pico_source) is None


def test_a_bare_model_and_another_head_have_the_same_masks(sparse_bert: Artifact) -> None:
    from transformers import AutoModel, AutoModelForTokenClassification

    for kind in (AutoModel, AutoModelForTokenClassification):
        model = kind.from_pretrained(sparse_bert.path)
        assert len(masks._weights(model, masks.pruned_layers(sparse_bert))) == 12


def test_pruning_further_keeps_what_is_gone(sparse_llama: Artifact, text_context: Callable[[], Context]) -> None:
    for importance in ("magnitude", "wanda", "sparsegpt"):
        config = Config(**QUICK, importance=importance, sparsity=0.7, calibration=CALIBRATION)
        further = run(sparse_llama, config, text_context())
        found = weights(further.path)
        for name, zeros in pruned(sparse_llama).items():
            assert bool((found[f"{name}.weight"][zeros] == 0).all())
        assert masks.sparsity(further) == pytest.approx(0.7, abs=0.01)


def test_the_file_goes_along(sparse_llama: Artifact, text_context: Callable[[], Context], tmp_path: Path) -> None:
    half = cast.run(sparse_llama, cast.Config(), text_context())
    assert masks.pruned_layers(half) == masks.pruned_layers(sparse_llama)
    assert masks.sparsity(half) == 0.5
    copy = load_folder(half.export_to(tmp_path / "copy"))
    assert masks.pruned_layers(copy) == masks.pruned_layers(sparse_llama)
    (copy.path / masks.FILE).write_text(json.dumps({"layers": 3}))
    with pytest.raises(StageError, match=r"sparsity\.json makes no sense"):
        masks.pruned_layers(copy)


# Quantisers that know nothing of masks: where 0 is on the grid, what is rounded to the nearest stays 0.


def test_bitsandbytes_keeps_them(sparse_llama: Artifact, text_context: Callable[[], Context]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from optimize.quantize import int8_bitsandbytes, nf4

    for result in (
        nf4.run(sparse_llama, nf4.Config(block_size=32), text_context()),
        nf4.run(sparse_llama, nf4.Config(block_size=32, data_type="fp4", double_quant=False), text_context()),
        int8_bitsandbytes.run(sparse_llama, int8_bitsandbytes.Config(), text_context()),
    ):
        model = AutoModelForCausalLM.from_pretrained(result.path, device_map={"": "cpu"})
        for name, zeros in pruned(sparse_llama).items():
            weight = model.get_submodule(name).weight
            state = getattr(weight, "quant_state", None)
            held = bitsandbytes.functional.dequantize_4bit(weight, state) if state else weight
            assert bool((held.reshape(zeros.shape)[zeros] == 0).all())
        assert masks.sparsity(result) is None  # packed in a way that does not say


def test_torchao_keeps_them(sparse_llama: Artifact, text_context: Callable[[], Context]) -> None:
    pytest.importorskip("torchao")
    from optimize.quantize import int8_torchao

    result = int8_torchao.run(sparse_llama, int8_torchao.Config(), text_context())
    model = AutoModelForCausalLM.from_pretrained(result.path, device_map={"": "cpu"})
    for name, zeros in pruned(sparse_llama).items():
        assert bool((model.get_submodule(name).weight.dequantize()[zeros] == 0).all())
    assert masks.sparsity(result) is None


def onnx_products(artifact: Artifact) -> dict[str, np.ndarray]:
    """What each multiplication by a constant matrix is by, [in, out], found by giving it the unit matrix."""
    import onnx
    import onnxruntime
    from onnx import helper

    model = onnx.load(artifact.path / "model.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        layer = node.name.partition("/")[0]
        if node.op_type not in ("MatMul", "MatMulNBits", "MatMulInteger") or node.input[1] not in constants:
            continue
        inputs = [constants[name] for name in node.input[1:] if name in constants]
        if node.op_type == "MatMulInteger":
            zero = [onnx.numpy_helper.to_array(constants[name]) for name in node.input[3:4] if name in constants]
            found[layer] = onnx.numpy_helper.to_array(inputs[0]).astype(np.int64) - (zero[0] if zero else 0)
            continue
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute} | {"accuracy_level": 1}
        if node.op_type == "MatMul":
            attributes = {}
        width = attributes.get("K") or constants[node.input[1]].dims[0]
        graph = helper.make_graph(
            [
                helper.make_node(
                    node.op_type, ["x", *(one.name for one in inputs)], ["y"], domain=node.domain, **attributes
                )
            ],
            "one",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [width, width])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            inputs,
        )
        one = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        found[layer] = session.run(None, {"x": np.eye(width, dtype=np.float32)})[0]
    return found


@pytest.fixture(scope="module")
def sparse_graph(sparse_bert: Artifact, new_context: Callable[..., Context]) -> Artifact:
    return export.run(sparse_bert, export.Config(), new_context())


@pytest.mark.parametrize(
    ("method", "settings", "keeps"),
    [
        (int8_onnxruntime, {"mode": "dynamic"}, True),
        (int4_onnxruntime, {"sym": True}, True),
        (int4_onnxruntime, {}, True),
        (int4_onnxruntime, {"algorithm": "hqq"}, False),  # its zero points are no whole numbers
    ],
)
def test_onnx_runtimes_quantisers_keep_them(
    method: Any, settings: dict[str, Any], keeps: bool, sparse_graph: Artifact, new_context: Callable[..., Context]
) -> None:
    result = method.run(sparse_graph, method.Config(**settings), new_context())
    before, after = onnx_products(sparse_graph), onnx_products(result)
    assert len(before) == 12
    assert all((after[name][matrix == 0] == 0).all() for name, matrix in before.items()) == keeps


def test_training_with_rounded_numbers_keeps_them(
    sparse_bert: Artifact,
    new_context: Callable[..., Context],
    pico_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = tasks.get("text-classification")
    splits = {"train": 0.4, "validation": 0.2, "calibration": 0.2, "evaluation": 0.2}
    labelled = prepare(task.Data(source=str(pico_csv), splits=splits), task, Work(tmp_path), tmp_path).for_stages()
    config = int8_qat_onnxruntime.Config(
        **QUICK,
        mode="qat",
        learning_rate=1e-3,
        batch_size=16,
        epochs=1,
        calibration={"num_samples": 8, "max_length": 16},
    )
    trained: dict[str, Tensor] = {}
    original = training.train

    def watched(*args: Any) -> Any:
        model, details = original(*args)
        trained.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        return model, details

    monkeypatch.setattr(training, "train", watched)
    int8_qat_onnxruntime.run(sparse_bert, config, replace(new_context(), data=labelled))
    before = weights(sparse_bert.path)
    for name, zeros in pruned(sparse_bert).items():
        assert torch.equal(trained[f"{name}.weight"] == 0, zeros)
        assert not torch.equal(trained[f"{name}.weight"], before[f"{name}.weight"])
