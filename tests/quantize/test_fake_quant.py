"""Fake quantisation: the numbers are those of QuantizeLinear and DequantizeLinear, the gradients those of LSQ."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from optimize.quantize.fake_quant import ActivationGrid, FakeQuantized, WeightGrid


def reference(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """ONNX Runtime's own pair."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "pair",
        [value("x", TensorProto.FLOAT, [None])],
        [value("y", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", TensorProto.UINT8, [], [zero]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_activations_are_those_of_onnx_runtime_to_the_last_bit() -> None:
    grid = ActivationGrid((0.1, 113), learn=False)
    halves = (np.arange(-400, 400) * np.float32(0.05)).astype(np.float32)  # ties, and beyond both ends
    x = np.concatenate([halves, np.random.default_rng(0).normal(0, 12, 1000).astype(np.float32)])
    np.testing.assert_array_equal(grid(torch.from_numpy(x)).detach().numpy(), reference(x, 0.1, 113))
    low, high = grid.range
    assert (low, high) == pytest.approx((-11.3, 14.2))


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_lie_on_their_grid_and_nothing_is_cut_off(per_channel: bool) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1], [9], [0], [3], [1e-3]])
    grid = WeightGrid(per_channel)
    rounded, scale = grid.round(weight, weight), grid.scale(weight)
    codes = rounded / scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.abs().max() == pytest.approx(127)
    assert ((rounded - weight).abs() <= scale / 2 * 1.0001).all()
    assert scale.shape == ((5, 1) if per_channel else (1, 1))


def test_gradients_pass_inside_and_stop_outside() -> None:
    grid = ActivationGrid((0.5, 10), learn=True)
    x = torch.tensor([-100.0, -1.1, 0.3, 1.0, 500.0], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (grid(x) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    # LSQ: the code where it is cut off, the rounding error in steps elsewhere; over the root of n * 255.
    slopes = torch.tensor([-10, -2 + 2.2, 1 - 0.6, 0, 245.0])
    assert grid.scale.grad is not None
    assert grid.scale.grad.item() == pytest.approx((slopes * weights).sum().item() / (5 * 255) ** 0.5, rel=1e-5)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table, self.up, self.down = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.table(ids)).relu())


def test_a_model_computes_on_codes_until_it_is_let_go() -> None:
    model = Model()
    names = set(model.state_dict())
    ids = torch.tensor([[1, 3, 8]])
    plain = model(ids)
    grids = {"a": (0.04, 128), "b": (0.04, 0)}
    fake = FakeQuantized(model, {"table": None, "up": "a", "down": "b"}, grids, per_channel=True)
    assert names < set(model.state_dict())
    rounded = model(ids)
    assert 0 < (rounded - plain).abs().max() < 0.3
    rounded.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    embedding = model.table.weight
    table = WeightGrid(False).round(embedding, embedding)
    torch.testing.assert_close(model.table(ids), table[ids], rtol=0, atol=0)
    fake.remove()
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(ids), plain, rtol=0, atol=0)
