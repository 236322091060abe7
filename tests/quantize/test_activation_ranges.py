"""Ranges of activations: what NumPy finds in all values at once, from batches, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from optimize.errors import StageError
from optimize.quantize import activation_ranges
from optimize.quantize.activation_ranges import BINS, Activations, Method, column_maxima, ranges

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[rows, 6] x) => (float[rows, 6] y) {
    doubled = Add (x, x)
    y = Relu (doubled)
}
"""


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    """40 batches of 60 rows of a long-tailed distribution with its middle above 0."""
    rng = np.random.default_rng(0)
    return [{"x": (rng.laplace(size=(60, 6)) + 0.3).astype(np.float32)} for _ in range(40)]


@pytest.fixture(scope="module")
def values(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([2 * batch["x"].ravel() for batch in batches]).astype(np.float64)


def found(batches: Sequence[Any], method: Method, *, percentile: float = 99.0, sym: bool = False) -> Any:
    activations = Activations(onnx.parser.parse_model(GRAPH), ["x", "doubled", "y"])
    return ranges(activations, batches, method, percentile=percentile, sym=sym, tick=lambda: None)


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    """Mean squared, of 256 levels between two bounds."""
    step = (high - low) / 255
    return float(np.square(np.clip(np.rint(values / step) * step, low, high) - values).mean())


def test_minmax(batches: list[dict[str, np.ndarray]], values: np.ndarray) -> None:
    told = found(batches, "minmax")
    assert told["doubled"] == (values.min(), values.max())
    assert told["x"] == (values.min() / 2, values.max() / 2)
    assert told["y"] == (0, values.max())
    largest = np.abs(values).max()
    assert found(batches, "minmax", sym=True)["doubled"] == (-largest, largest)


def test_percentile(batches: list[dict[str, np.ndarray]], values: np.ndarray) -> None:
    bin_width = (values.max() - values.min()) / BINS
    expected = np.percentile(values, [0.5, 99.5])
    assert found(batches, "percentile")["doubled"] == pytest.approx(expected, abs=bin_width)
    assert found(batches, "percentile", percentile=100)["doubled"] == pytest.approx((values.min(), values.max()))
    low, high = found(batches, "percentile", sym=True)["doubled"]
    assert -low == high == pytest.approx(np.abs(expected).max(), abs=2 * bin_width)


@pytest.mark.parametrize("sym", [False, True])
def test_mse_is_the_best_of_its_grid(batches: list[dict[str, np.ndarray]], values: np.ndarray, sym: bool) -> None:
    low, high = found(batches, "mse", sym=sym)["doubled"]
    (whole_low, whole_high) = found(batches, "minmax", sym=sym)["doubled"]
    shares = np.linspace(1, 1 / 8, 29)
    grid = [(a, a) for a in shares] if sym else [(a, b) for a in shares for b in shares]
    best = min(rounding_error(values, whole_low * a, whole_high * b) for a, b in grid)
    assert rounding_error(values, low, high) <= 1.05 * best
    assert best < 0.99 * rounding_error(values, whole_low, whole_high)


def test_entropy_cuts_a_tail_and_keeps_what_has_none(batches: list[dict[str, np.ndarray]], values: np.ndarray) -> None:
    low, high = found(batches, "entropy")["doubled"]
    assert values.min() < low < high < values.max()
    assert np.mean((values >= low) & (values <= high)) > 0.99
    even = [{"x": np.linspace(-1, 1, 600, dtype=np.float32).reshape(100, 6)}]
    assert found(even, "entropy")["x"] == (-1, 1)


def test_entropy_is_the_divergence_of_the_rounded_histogram() -> None:
    """Against the definition, a bin at a time."""
    rng = np.random.default_rng(1)
    counts = np.histogram(rng.standard_normal(20_000), bins=BINS, range=(-5, 5))[0]
    bounds = (-2.5, 2.5)
    inside = counts[BINS // 4 : -BINS // 4].astype(float)
    clipped = inside.copy()
    clipped[0] += counts[: BINS // 4].sum()
    clipped[-1] += counts[-BINS // 4 :].sum()
    per_level = len(inside) // 256
    rounded = np.zeros_like(inside)
    for level in range(256):
        bins = slice(level * per_level, (level + 1) * per_level)
        filled = inside[bins] > 0
        if filled.any():
            rounded[bins] = np.where(filled, inside[bins].sum() / filled.sum(), 0)
    p, q = clipped / clipped.sum(), rounded / rounded.sum()
    expected = sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)
    assert activation_ranges._divergence(counts, (-5, 5), bounds) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile", "mse"])
def test_an_activation_without_spread_is_no_trouble(method: Method) -> None:
    zeros = [{"x": np.zeros((4, 6), dtype=np.float32)}]
    assert found(zeros, method)["x"] == (0, 0)
    constant = [{"x": np.full((4, 6), 3, dtype=np.float32)}]
    low, high = found(constant, method)["x"]
    assert low == 0
    assert 2.9 < high <= 3


def test_batches_are_looked_at_one_after_another(batches: list[dict[str, np.ndarray]]) -> None:
    """Nothing of a batch is held when the next one is asked for but arrays of a fixed size."""
    import tracemalloc

    peaks = []
    for count in (5, 40):
        tracemalloc.start()
        found(batches[:count], "mse")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_column_maxima(batches: list[dict[str, np.ndarray]]) -> None:
    activations = Activations(onnx.parser.parse_model(GRAPH), ["doubled"])
    told = column_maxima(activations, batches, lambda: None)
    expected = np.abs(np.concatenate([2 * batch["x"] for batch in batches])).max(axis=0)
    assert np.array_equal(told["doubled"], expected)


def test_a_number_that_is_not_finite_is_named() -> None:
    infinite = [{"x": np.full((4, 6), 3e38, dtype=np.float32)}]
    model = onnx.parser.parse_model(GRAPH)
    model.graph.node[0].name = "layer/Add"
    with pytest.raises(StageError, match=r"node 'layer/Add' \(Add\) gives numbers that are not finite"):
        ranges(Activations(model, ["doubled"]), infinite, "minmax", percentile=99, sym=False, tick=lambda: None)
