"""Which metrics a task has, and which limits make sense for them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from optimize.evaluate.types import TIMES, times_of

if TYPE_CHECKING:
    from optimize.recipe import Evaluate, Gate
    from optimize.tasks import Task

MEASURED = (*TIMES, "size", "peak_memory")
"""Metrics that belong to no one task; less is better in all of them."""
USER_METRIC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""`module:function`."""

ABSOLUTE = ("min", "max", "max_ms")
RELATIVE = ("max_drop", "max_increase", "min_ratio", "max_ratio", "min_speedup")
"""Limits of a comparison with another artifact."""

_HIGHER = {"max": "min", "max_increase": "max_drop", "max_ratio": "min_ratio"}
_LOWER = {"min": "max", "max_drop": "max_increase", "min_ratio": "max_ratio"}
_TIME = {
    **{"min": "max_ms", "max": "max_ms"},
    **{"max_drop": "min_speedup", "max_increase": "min_speedup", "min_ratio": "min_speedup"},
}
"""What was meant by a limit that is senseless where more is better, where less is, and for times."""


def measured_of(task: Task) -> list[str]:
    """Those of `MEASURED` that the task's models have."""
    return [name for name in MEASURED if name not in TIMES or name in times_of(task)]


def measure_fault(metric: str, task: Task | None, evaluate: Evaluate | None) -> tuple[str, str] | None:
    """Why one of `MEASURED` will not be had, and what to try."""
    if task and metric in MEASURED and metric not in measured_of(task):
        times = " and ".join(f"`{time}`" for time in times_of(task))
        return f"`{metric}` does not apply to {task.name}", f"its speed is {times}"
    off = None
    if evaluate and metric in TIMES:
        if not evaluate.latency:
            off = "latency"
        elif metric == "decode" and not evaluate.latency.decode:
            off = "latency.decode"
    elif evaluate and metric == "peak_memory" and not evaluate.peak_memory:
        off = "peak_memory"
    return (f"nothing measures `{metric}`", f"turn on `evaluate.{off}`") if off else None


def limit_fault(gate: Gate, task: Task | None) -> tuple[str, str | None] | None:
    """What is wrong with a limit that does not fit its metric, and what to try.

    Whether more of a function of the user's own is better is known only at run time.
    """
    limit, metric = gate.limit[0], gate.metric
    if metric in TIMES:
        meant, why = _TIME, "it is compared as a ratio"
    elif limit in {"max_ms", "min_speedup"}:
        return f"`{limit}` is a limit of latency, not of `{metric}`", None
    elif metric in MEASURED:
        meant, why = _LOWER, "less is better"
    elif task and metric in task.metrics:
        higher = task.metrics[metric].higher_is_better
        meant, why = (_HIGHER, "more is better") if higher else (_LOWER, "less is better")
    else:
        return None
    if limit not in meant:
        return None
    return f"`{limit}` makes no sense for `{metric}`: {why}", f"did you mean `{meant[limit]}`?"
