"""Which limits make sense for which metric."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimize.recipe import Gate
    from optimize.tasks import Task

MEASURED = ("latency", "size", "peak_memory")
"""Metrics that every artifact has whatever its task; less is better in all of them."""
USER_METRIC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""`module:function`."""

ABSOLUTE = ("min", "max", "max_ms")
RELATIVE = ("max_drop", "max_increase", "min_ratio", "max_ratio", "min_speedup")
"""Limits of a comparison with another artifact."""

_HIGHER = {"max": "min", "max_increase": "max_drop", "max_ratio": "min_ratio"}
_LOWER = {"min": "max", "max_drop": "max_increase", "min_ratio": "max_ratio"}
_LATENCY = {
    **{"min": "max_ms", "max": "max_ms"},
    **{"max_drop": "min_speedup", "max_increase": "min_speedup", "min_ratio": "min_speedup"},
}
"""What was meant by a limit that is senseless where more is better, where less is, and for latency."""


def limit_fault(gate: Gate, task: Task | None) -> tuple[str, str | None] | None:
    """What is wrong with a limit that does not fit its metric, and what to try.

    Whether more of a function of the user's own is better is known only at run time.
    """
    limit, metric = gate.limit[0], gate.metric
    if metric == "latency":
        meant, why = _LATENCY, "it is compared as a ratio"
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
