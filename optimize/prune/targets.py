"""The smallest pruning ratio that reaches a target: so many parameters, so many multiplications, so many milliseconds.

Ratios are whole per cents, found by bisection, which supposes that a narrower model is never larger or slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.tasks import Inputs

LARGEST = 95
"""Per cent."""
_WARM_SECONDS, _SECONDS, _FEWEST = 0.5, 2.0, 20


def smallest_ratio(target: float, measure: Callable[[float], float]) -> tuple[float, list[dict[str, float]]]:
    """(the ratio, what was measured on the way: {"pruning_ratio", "value"} each).

    `measure` gives what a model pruned at a ratio comes to; a ratio at which it raises `StageError` is too large.
    Raises `StageError` where no ratio reaches the target.
    """
    probes: list[dict[str, float]] = []
    below, above = 0, LARGEST + 1
    last: StageError | None = None
    while above - below > 1:
        ratio = (below + above) // 2
        try:
            value = measure(ratio / 100)
        except StageError as error:
            above, last = ratio, error
            continue
        probes.append({"pruning_ratio": ratio / 100, "value": value})
        below, above = (below, ratio) if value <= target else (ratio, above)
    reached = [probe["pruning_ratio"] for probe in probes if probe["value"] <= target]
    if not reached:
        least = min((probe["value"] for probe in probes), default=None)
        raise StageError(
            "no pruning_ratio reaches the target" + (f": {least:.4g} is the least seen" if least is not None else ""),
            hint=last.hint if last and least is None else "prune more kinds of units, or ask for less",
        ) from last
    return min(reached), probes


def milliseconds(artifact: Artifact, inputs: Inputs, threads: int) -> float:
    """The median time of a call of an artifact, in this process, after some that warm it up."""
    from statistics import median

    from optimize.runtimes import open_artifact

    runner: Any = open_artifact(artifact, threads)
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_SECONDS:
        runner.run(inputs)
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < _SECONDS or len(times) < _FEWEST:
        start = time.perf_counter()
        runner.run(inputs)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)
