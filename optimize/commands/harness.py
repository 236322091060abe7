"""`optimize harness`: what lm-eval found, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line for each metric of each task: its value and standard error."""
    from rich import box
    from rich.table import Table

    drawn = Table("task", "metric", "value", "standard error", box=box.SIMPLE_HEAD)
    for task, found in results.items():
        for name, value in found.items():
            metric, comma, filter_ = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{filter_}")
                drawn.add_row(
                    task, metric if filter_ == "none" else f"{metric} ({filter_})", *map(_number, (value, error))
                )
    return drawn


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else ""
