"""Rounded numbers that OpenVINO does not compute on as codes are found in the compiled model, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.context import Context
from optimize.export import openvino_graph
from optimize.progress import Progress
from optimize.quantize import openvino_fusion
from optimize.runtimes import openvino as runtime

ov = pytest.importorskip("openvino")


class Told(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)


def rounded(value: Any, name: str, levels: int = 256) -> Any:
    low, high = np.float32(-1), np.float32(1)
    return ov.opset13.fake_quantize(value, low, high, low, high, levels, name=name)


@pytest.fixture(scope="module")
def model() -> Any:
    """x -> rounded -> sin -> rounded -> matmul -> softmax -> rounded to a grid of its own -> matmul."""
    ops = ov.opset13
    chance = np.random.default_rng(0)
    x = ops.parameter([-1, 16], np.float32, name="x")
    weights = [
        rounded(ops.constant(chance.normal(size=(16, 16)).astype(np.float32)), f"weight{number}", 255)
        for number in range(2)
    ]
    sine = ops.sin(rounded(x, "before_sine"), name="sine")
    first = ops.matmul(rounded(sine, "before_first"), weights[0], False, True, name="first")
    odd = rounded(ops.softmax(first, 1, name="softmax"), "before_second", 200)
    second = ops.matmul(odd, weights[1], False, True, name="second")
    return ov.Model([ops.result(second, name="result")], [x], "model")


def test_only_those_that_stay_floats_are_found(model: Any) -> None:
    executed = runtime.serve(model, threads=1).compiled.get_runtime_model()
    found = openvino_fusion.unfused(model, executed)
    # OpenVINO has no sine of codes, and multiplies none of 200 levels; the matrix between them is multiplied in bytes.
    assert set(found) == {"sine", "second"}
    assert found["second"] == "FullyConnected"
    floats = openvino_fusion.in_float(executed)
    assert {"sine", "second"} <= floats
    assert "first" not in floats


def test_they_are_counted_and_named(model: Any, new_context: Callable[..., Context], tmp_path: Path) -> None:
    openvino_graph.save(model, tmp_path)
    told = Told()
    openvino_fusion.advise(tmp_path, new_context(progress=told))
    (warning,) = told.warnings
    assert "no integer operator for 2 nodes" in warning
    assert "sine (Math)" in warning
    told.warnings.clear()
    openvino_fusion.advise(tmp_path, new_context(progress=told), ["first", "second"])
    layer, node = told.warnings
    assert layer.startswith("OpenVINO computes second in float on this processor")
    assert "for 1 nodes" in node
