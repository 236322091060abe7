"""Checkpoints of bitsandbytes: a graph on their very codes computes with the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import decoder_weights, nbits
from optimize.quantize import int8_bitsandbytes, nf4

functional = pytest.importorskip("bitsandbytes").functional

LAYER = "model.layers.1.mlp.down_proj"
"""96 inputs, 64 outputs."""


@pytest.fixture(scope="module")
def llama(pico_llama: Path) -> Artifact:
    spec = {"name": "causal-lm", "context_length": 64, "stride": 64, "separator": "\n"}
    return Artifact.from_directory(pico_llama, format="transformers", task=spec)


def product_with_identity(node: onnx.NodeProto, tensors: dict[str, np.ndarray], width: int) -> np.ndarray:
    """What an operator on codes takes for the weight [out, in]."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [width, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(width, dtype=np.float32)})[0].T


@pytest.mark.parametrize("settings", [{"double_quant": True}, {"data_type": "fp4", "double_quant": False}])
def test_four_bits_stand_for_what_bitsandbytes_reads(
    llama: Artifact, new_context: Callable[..., Context], settings: dict[str, Any]
) -> None:
    parent = nf4.run(llama, nf4.Config(block_size=32, **settings), new_context())
    model, codes = decoder_weights.load(parent, new_context(), block=32)
    assert len(codes) == 14
    weight, state = functional.quantize_4bit(
        load_file(llama.path / "model.safetensors")[f"{LAYER}.weight"],
        blocksize=32,
        quant_type=settings.get("data_type", "nf4"),
        compress_statistics=settings["double_quant"],
    )
    expected = functional.dequantize_4bit(weight, state).numpy()
    np.testing.assert_array_equal(model.get_submodule(LAYER).weight.detach().numpy(), expected)
    packed = codes[LAYER]
    assert isinstance(packed, nbits.Bnb4)
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "codes", "absmax"],
        ["y"],
        domain="com.microsoft",
        **{"K": packed.width, "N": packed.height, "block_size": packed.block, "quant_type": int(packed.nf4)},
    )
    tensors = {"codes": packed.codes.numpy(), "absmax": packed.absmax.numpy()}
    np.testing.assert_array_equal(product_with_identity(node, tensors, packed.width), expected)


def test_eight_bits_stand_for_what_bitsandbytes_reads(llama: Artifact, new_context: Callable[..., Context]) -> None:
    parent = int8_bitsandbytes.run(llama, int8_bitsandbytes.Config(), new_context())
    model, codes = decoder_weights.load(parent, new_context(), block=32)
    stored = load_file(parent.path / "model.safetensors")
    expected = functional.int8_vectorwise_dequant(stored[f"{LAYER}.weight"], stored[f"{LAYER}.SCB"]).numpy()
    packed = codes[LAYER]
    assert isinstance(packed, nbits.Packed)
    assert (packed.bits, packed.block) == (8, 32)
    np.testing.assert_array_equal(packed.dequantize().numpy(), model.get_submodule(LAYER).weight.detach().numpy())
    # Two products in another order: the last bit.
    np.testing.assert_allclose(packed.dequantize().numpy(), expected, rtol=3e-7)


def test_other_quantisations_are_refused(llama: Artifact, new_context: Callable[..., Context], tmp_path: Path) -> None:
    for path in llama.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "awq"},', 1))
    artifact = Artifact.from_directory(tmp_path, format="transformers", task=llama.task)
    with pytest.raises(StageError, match="weights quantised by 'awq' can't be exported"):
        decoder_weights.load(artifact, new_context(), block=32)
