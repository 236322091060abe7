"""What scoring hands to gates, and gates hand to everybody: comparisons and gate results.

Both are written to `run.json` as they stand, so `to_json` is a contract: numbers that JSON has no word for (an infinite
interval end, when there are too few rounds) become `null`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optimize.tasks import Task

Interval = tuple[float, float]
Unit = Literal["difference", "ratio", "speedup", "absolute"]
Verdict = Literal["pass", "fail", "inconclusive"]

TIMES = ("latency", "prefill", "decode")
"""Metrics that say how long a call takes; `times_of` says which of them a task has."""
LEVEL = 0.05
"""A gate is a one-sided test at this level, which is what a two-sided interval of `CONFIDENCE` decides."""
CONFIDENCE = 1 - 2 * LEVEL


@dataclass(frozen=True)
class Comparison:
    """One measure of one artifact, held against another (`over`) or, with unit `absolute`, standing alone."""

    artifact: str
    over: str | None
    metric: str
    setting: str | None
    """What it was measured at, such as `batch_size=8,sequence_length=128,threads=1`; None where there is one only."""
    estimate: float
    unit: Unit
    """`difference`: candidate - over; `ratio`: candidate / over; `speedup`: time of over / time of candidate;
    `absolute`: the artifact's own value, in the metric's own unit (latency: milliseconds; size: bytes)."""
    ci: Interval
    n: int
    """Rows, or rounds of latency."""
    confidence: float = CONFIDENCE
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts shown beside it (`mcnemar_p`, `flips`). A `difference` carries `ratio: {"estimate", "ci"}`, the same
    comparison as a share, so that `min_ratio` and `max_ratio` can be judged."""

    def to_json(self) -> dict[str, Any]:
        return to_plain(asdict(self))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GateResult:
    """What one gate says about one artifact at one setting."""

    metric: str
    artifact: str
    over: str | None
    setting: str | None
    limit: Mapping[str, float]
    """One entry, such as {"min_speedup": 1.5}."""
    estimate: float
    ci: Interval
    margin: float
    """How far the estimate lies on the good side of the limit (negative: on the bad side), in the estimate's unit."""
    verdict: Verdict
    reason: str
    on_inconclusive: Literal["fail", "warn"] = "fail"
    location: str | None = None
    """Where the gate stands, `recipe.yaml:12:5`; None where the recipe is no file."""
    acknowledged: Mapping[str, str] | None = None
    """{"reason", "expires", "location"} of the line that lets this regression pass for now; the verdict stays."""

    def to_json(self) -> dict[str, Any]:
        return to_plain(asdict(self))  # type: ignore[no-any-return]


def times_of(task: Task) -> tuple[str, ...]:
    """A model that generates makes its user wait for the first token, then for each further one; others answer."""
    return ("prefill", "decode") if task.generates else ("latency",)


def to_plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: tuples become lists, NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
