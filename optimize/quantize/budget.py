"""An accuracy budget: which layers stay in float so that the rest may be rounded.

    stages:
      - quantize: int8
        mode: static
        max_drop: 0.005

Each layer is quantised alone, and how far the answers move from the float model's is its sensitivity: a few dozen rows
tell layers apart by the answers' distributions that a metric, which counts whole rows, could not. What is then kept in
float is the beginning of the list of layers from the most sensitive on, no longer than it has to be for the task's own
metric to drop by `max_drop` at most on the labelled calibration rows. How long is found by bisection, which supposes
that more layers in float never lose more. Then each kept layer is put back, from the least sensitive on, and stays
quantised where the budget allows. So the result always meets the budget, and none of its layers could be put back; a
smaller set of other layers may exist, since only trying all 2^n would tell.

The drop is that of these very rows, without an interval: a gate on the evaluation rows is what proves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.artifact import Artifact
    from optimize.context import Context
    from optimize.runtimes import Runner

MOST_ROWS = 2000
"""Of the calibration split, that the metric is computed on."""
RANKING_ROWS = 64
"""Of these, that a layer's sensitivity is measured on."""
BATCH_SIZE = 8


@dataclass(frozen=True)
class Spent:
    """What the budget was spent on."""

    kept: tuple[str, ...]
    """Layers that stay in float, in the order in which they were given."""
    details: dict[str, Any]
    """For the manifest: {"metric", "rows", "float", "quantized" (with nothing kept), "chosen", "max_drop", "distance",
    "distance_rows", "layers": {name: sensitivity, largest first}}."""


def spend(
    max_drop: float,
    layers: Sequence[str],
    quantized_without: Callable[[Collection[str]], Runner],
    artifact: Artifact,
    context: Context,
) -> Spent:
    """Find the layers to keep in float.

    `quantized_without` opens the model with all `layers` quantised but those it is given; all of them must give the
    float model. Asked len(layers) + about 10 times. `artifact` has the preprocessor and the task's spec.

    Raises `StageError` where the calibration split is empty, or where no layer can be quantised, not even alone.
    """
    judge = _Judge(artifact, context)
    reference = quantized_without(layers)
    float_score = judge.score(reference)
    expected = judge.outputs(reference, judge.few)
    del reference
    if judge.granularity > max_drop:
        context.warn(
            f"one of {judge.rows.num_rows} calibration rows is {judge.granularity:.2g} of {judge.metric.name}: "
            f"max_drop {max_drop:g} can't be told from no drop at all; give the split more rows"
        )
    steps = len(layers) + 2 + math.ceil(math.log2(len(layers) + 1))
    sensitivity: dict[str, float] = {}
    for done, layer in enumerate(layers):
        context.update(done, steps, f"sensitivity of {layer}")
        runner = quantized_without([other for other in layers if other != layer])
        sensitivity[layer] = judge.distance(judge.outputs(runner, judge.few), expected)
    order = sorted(layers, key=lambda layer: -sensitivity[layer])
    scores: dict[frozenset[str], float] = {frozenset(layers): float_score}

    def fits(kept: Collection[str]) -> bool:
        key = frozenset(kept)
        if key not in scores:
            context.update(min(len(layers) + len(scores), steps), steps, f"{len(kept)} layers in float")
            scores[key] = judge.score(quantized_without(kept))
        drop = float_score - scores[key] if judge.metric.higher_is_better else scores[key] - float_score
        return drop <= max_drop + 1e-12  # a difference of two sums

    kept = _least(order, fits)
    if len(kept) == len(layers):
        raise StageError(
            f"no layer can be quantised within max_drop {max_drop:g} of {judge.metric.name}: each alone costs more, "
            f"even {order[-1]!r}, to which the answers are the least sensitive",
            hint="allow a larger max_drop, give the calibration split more rows, or use another method",
        )
    return Spent(
        kept=tuple(layer for layer in layers if layer in kept),
        details={
            "metric": judge.metric.name,
            "rows": judge.rows.num_rows,
            "float": _rounded(float_score),
            "quantized": _rounded(scores[frozenset()]),
            "chosen": _rounded(scores[frozenset(kept)]),
            "max_drop": max_drop,
            "distance": judge.signal,
            "distance_rows": judge.few.num_rows,
            "layers": {layer: _rounded(sensitivity[layer]) for layer in order},
        },
    )


def _least(order: Sequence[str], fits: Callable[[Collection[str]], bool]) -> list[str]:
    """The shortest beginning of `order` that bisection finds to fit, without those that can be put back."""
    if fits([]):
        return []
    short, enough = 0, len(order)
    while enough - short > 1:
        middle = (short + enough) // 2
        if fits(order[:middle]):
            enough = middle
        else:
            short = middle
    kept = list(order[:enough])
    for layer in reversed(order[: enough - 1]):  # without the last one it does not fit
        without = [other for other in kept if other != layer]
        if fits(without):
            kept = without
    return kept


class _Judge:
    """Labelled calibration rows, and how far answers to them are from right and from each other."""

    def __init__(self, artifact: Artifact, context: Context) -> None:
        self.task = context.task
        self.metric = self.task.metrics[self.task.default_metrics[0]]
        self.rows = context.data.rows("calibration").slice(0, MOST_ROWS)
        if not self.rows.num_rows:
            raise StageError("max_drop needs calibration rows", hint="give `data.splits.calibration` a share")
        self.few = self.rows.slice(0, RANKING_ROWS)
        self.targets = self.task.targets(self.rows)
        self.spec = self.task.evaluation_spec(artifact.task, context.data.info)
        self.preprocessor = self.task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
        self.granularity = 1 / self.rows.num_rows if self.metric.kind == "binary" else 0.0
        """The smallest change of the metric, where it is known."""
        self.signal = ""
        """Which distance it was, once there was one."""

    def outputs(self, runner: Runner, rows: pa.Table) -> NDArray[Any]:
        return self.task.respond(runner, self.preprocessor, rows, self.spec, batch_size=BATCH_SIZE)

    def score(self, runner: Runner) -> float:
        return self.metric.compute(self.outputs(runner, self.rows), self.targets)

    def distance(self, outputs: NDArray[Any], reference: NDArray[Any]) -> float:
        """The mean KL divergence in nats where answers are distributions, else the mean largest difference; infinite
        where an answer is no number.
        """
        import numpy as np

        with np.errstate(all="ignore"):
            told = self.task.fidelity(outputs, reference)
            self.signal = "kl" if "kl" in told else "difference"
            value = told["kl"]["mean"] if "kl" in told else self.task.differences(outputs, reference).mean()
        return float(value) if np.isfinite(value) else math.inf


def _rounded(value: float) -> float | None:
    """Three digits, for the rest says more about the processor; infinity is no JSON."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
