"""Calibration of an ONNX graph: between which two numbers do activations lie?

The graph is run in float on calibration rows, a batch at a time, and gives the activations that will be rounded as
outputs. What is kept of them has a fixed size, so that memory does not grow with the number of rows: the smallest and
the largest value in a first pass, and, where a method weighs clipping against rounding, a histogram of `BINS` bins
between the two in a second.

- `minmax`: all values seen.
- `percentile`: what is left without the outermost values, as many on each side.
- `mse`: the least expected squared error: step^2 / 12 of values inside (they are spread evenly over a step), the
  distance to the edge of those outside. The bounds are sought on a grid of shares of the whole range.
- `entropy`: on the same grid, the least Kullback-Leibler divergence of the rounded histogram from the clipped one
  (Migacz, "8-bit inference with TensorRT", GTC 2017), as ONNX Runtime and TensorRT have it.

0 always lies in the range, since it has to be exact (padding, ReLU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from optimize.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto

    from optimize.tasks import Inputs

Method = Literal["minmax", "entropy", "percentile", "mse"]
Range = tuple[float, float]

BINS = 2048
LEVELS = 256
_FINEST_SHARE = 1 / 8
"""Of the range that clipping may leave: a bin for each level."""
_SHARES = 29


class Activations:
    """A graph opened so that it also gives what flows along some of its edges. `names` are those edges."""

    def __init__(self, model: ModelProto, names: Sequence[str]) -> None:
        """Raises `StageError` where ONNX Runtime can't open the graph."""
        import onnx
        import onnxruntime

        self.names = list(names)
        given = {value.name for value in (*model.graph.output, *model.graph.input)}
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        watched.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in names
            if name not in given
        )
        self._producers = {output: node for node in model.graph.node for output in node.output}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # more would give other last digits
        try:
            self._session = onnxruntime.InferenceSession(
                watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise StageError(f"ONNX Runtime can't open the graph for calibration: {error}") from error
        self._takes = [value.name for value in self._session.get_inputs()]

    def of(self, inputs: Inputs) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Each edge and its values for one batch. Raises `StageError` where one is not finite, or memory runs out."""
        import numpy as np

        wanted = [name for name in self.names if name not in inputs]
        try:
            arrays = self._session.run(wanted, {name: inputs[name] for name in self._takes})
        except Exception as error:  # as above
            raise StageError(
                f"ONNX Runtime can't run the graph on calibration rows: {error}",
                hint="where memory ran out, lower calibration.batch_size or calibration.max_length",
            ) from error
        found = {**inputs, **dict(zip(wanted, arrays, strict=True))}
        for name in self.names:
            if not np.isfinite(found[name]).all():
                node = self._producers.get(name)
                where = f"node {node.name!r} ({node.op_type})" if node is not None else f"input {name!r}"
                raise StageError(
                    f"calibration: {where} gives numbers that are not finite",
                    hint="the model overflows in float already: look at its answers, or at the calibration rows",
                )
            yield name, found[name]


def column_maxima(
    activations: Activations, batches: Sequence[Inputs], tick: Callable[[], None]
) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude of each column (the last axis) of each edge, [columns]. `tick` is told after each batch."""
    import numpy as np

    maxima: dict[str, NDArray[np.float32]] = {}
    for inputs in batches:
        for name, values in activations.of(inputs):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            maxima[name] = np.maximum(maxima[name], largest) if name in maxima else largest
        tick()
    return maxima


def ranges(
    activations: Activations,
    batches: Sequence[Inputs],
    method: Method,
    *,
    percentile: float,
    sym: bool,
    tick: Callable[[], None],
) -> dict[str, Range]:
    """The bounds of each edge; with `sym` as far below 0 as above. `tick` is told after each batch of each pass."""
    import numpy as np

    whole: dict[str, Range] = {}
    for inputs in batches:
        for name, values in activations.of(inputs):
            low, high = whole.get(name, (0.0, 0.0))
            whole[name] = (min(low, float(values.min())), max(high, float(values.max())))
        tick()
    if sym:
        whole = {name: (-max(-low, high), max(-low, high)) for name, (low, high) in whole.items()}
    if method == "minmax":
        return whole
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in whole}
    for inputs in batches:
        for name, values in activations.of(inputs):
            counts[name] += np.histogram(values, bins=BINS, range=_open(whole[name]))[0]
        tick()
    return {
        name: choose(counts[name], bounds, method, percentile=percentile, sym=sym) for name, bounds in whole.items()
    }


def passes(method: Method) -> int:
    """How often `ranges` goes over the rows."""
    return 1 if method == "minmax" else 2


def choose(counts: NDArray[np.int64], whole: Range, method: Method, *, percentile: float, sym: bool) -> Range:
    """The bounds that a method other than `minmax` finds in a histogram of [BINS] even bins over the range `whole`."""
    if whole[0] == whole[1]:
        return whole
    if method == "percentile":
        return _percentile(counts, whole, percentile, sym)
    cost = _squared_error if method == "mse" else _divergence
    return min(_candidates(whole, sym), key=lambda bounds: cost(counts, whole, bounds))


def _open(bounds: Range) -> Range:
    """A range that is no single point, as a histogram needs it."""
    return bounds if bounds[0] < bounds[1] else (bounds[0], bounds[1] + 1.0)


def _candidates(whole: Range, sym: bool) -> list[Range]:
    """The largest first, which so wins a tie."""
    import numpy as np

    shares = np.linspace(1, _FINEST_SHARE, _SHARES).tolist()
    low, high = whole
    if sym:
        return [(low * share, high * share) for share in shares]
    return [(low * a, high * b) for a in (shares if low else [1.0]) for b in (shares if high else [1.0])]


def _percentile(counts: NDArray[np.int64], whole: Range, percentile: float, sym: bool) -> Range:
    import numpy as np

    edges = np.linspace(*whole, BINS + 1)
    shares = np.concatenate([[0], counts.cumsum()]) / counts.sum()
    outside = (100 - percentile) / 200
    low, high = (float(edge) for edge in np.interp([outside, 1 - outside], shares, edges))
    low, high = min(low, 0.0), max(high, 0.0)
    return (-max(-low, high), max(-low, high)) if sym else (low, high)


def _squared_error(counts: NDArray[np.int64], whole: Range, bounds: Range) -> float:
    """Of all values together."""
    import numpy as np

    low, high = bounds
    middles = _middles(whole)
    beyond = np.maximum(low - middles, 0) + np.maximum(middles - high, 0)
    step = (high - low) / (LEVELS - 1)
    return float((counts * np.where(beyond > 0, beyond**2, step**2 / 12)).sum())


def _divergence(counts: NDArray[np.int64], whole: Range, bounds: Range) -> float:
    """KL(clipped || rounded) in nats."""
    import numpy as np

    inside = (_middles(whole) >= bounds[0]) & (_middles(whole) <= bounds[1])
    kept = counts[inside].astype(np.float64)
    first = int(inside.argmax())
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[first + len(kept) :].sum()
    # A level's share is spread over those of its bins that hold anything.
    level = np.arange(len(kept)) * LEVELS // max(len(kept), LEVELS)
    filled = kept > 0
    members = np.bincount(level, weights=filled, minlength=LEVELS)
    rounded = np.where(filled, (np.bincount(level, weights=kept) / np.maximum(members, 1)[: level[-1] + 1])[level], 0)
    p, q = clipped / clipped.sum(), rounded / max(rounded.sum(), 1)
    # Bins that only clipping filled have no level: as in the original, they count with a vanishing share.
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())


def _middles(whole: Range) -> NDArray[np.float64]:
    import numpy as np

    edges = np.linspace(*whole, BINS + 1)
    return (edges[1:] + edges[:-1]) / 2
