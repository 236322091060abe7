"""Modules of the user's own, opened and asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import EvaluationError
from optimize.export import onnx
from optimize.runtimes import pytorch


def test_it_answers_like_the_module(pico_module: Artifact) -> None:
    runner = runtimes.open_artifact(pico_module, 1)
    pixels = np.random.default_rng(0).normal(size=(5, 3, 12, 12)).astype("float32")
    module = pytorch.load(pico_module.path, trusted=True)
    with torch.inference_mode():
        expected = module(torch.from_numpy(pixels)).numpy()
    answer = runner.run({"pixel_values": pixels})
    assert list(answer) == ["logits"]
    assert np.array_equal(answer["logits"], expected)
    floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    assert runtimes.get("pytorch").parameters(pico_module.path) == sum(tensor.numel() for tensor in floats)


def test_it_is_no_decoder_and_says_what_it_can_not_take(pico_module: Artifact) -> None:
    runner = runtimes.open_artifact(pico_module, 1)
    with pytest.raises(EvaluationError, match="is no decoder"):
        runner.decoder(8)
    with pytest.raises(EvaluationError, match="can't take these inputs"):
        runner.run({"pixel_values": np.zeros((1, 5, 12, 12), "float32")})


def test_answers_have_names() -> None:
    tensor = torch.ones(2, 3)
    assert list(pytorch.named(tensor)) == ["logits"]
    assert list(pytorch.named({"logits": tensor, "note": "text"})) == ["logits"]
    with pytest.raises(TypeError, match="gives a tuple, and not one tensor of logits"):
        pytorch.named((tensor, tensor))


@pytest.mark.parametrize("kind", ["pico_module", "pico_vit"])
def test_exported_to_onnx(kind: str, request: pytest.FixtureRequest, image_context: Callable[[], Context]) -> None:
    import onnx as onnx_format

    artifact: Artifact = request.getfixturevalue(kind)
    context = image_context()
    exported = onnx.run(artifact, onnx.Config(), context)
    assert exported.format == "onnx"
    assert exported.details["max_difference"] < 1e-5
    graph = onnx_format.load(exported.path / "model.onnx").graph
    (pixels,) = graph.input
    assert pixels.name == "pixel_values"
    axes = pixels.type.tensor_type.shape.dim
    assert (axes[0].dim_param, [axis.dim_value for axis in axes[1:]]) == ("batch", [3, 12, 12])
    assert [value.name for value in graph.output] == ["logits"]
    names = [node.name for node in graph.node]
    assert any(name.startswith("head/" if kind == "pico_module" else "classifier/") for name in names)
    if kind == "pico_module":
        assert onnx.run(artifact, onnx.Config(), image_context()).digest == exported.digest
