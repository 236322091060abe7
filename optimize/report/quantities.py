"""Every score of a `run.json` as a flat row: what a database, a tracker and a chart want alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optimize.evaluate.types import TIMES

SETTINGS = ("batch_size", "sequence_length", "prompt_length", "new_tokens", "threads")
"""What a time is measured at, in the order of `setting` in comparisons and gates."""
HOST_BOUND = (*TIMES, "peak_memory")
"""Metrics whose values on two hosts are never compared."""


@dataclass(frozen=True)
class Quantity:
    """One number about one artifact."""

    artifact: str
    metric: str
    """As gates name it (`accuracy`, `latency`: the median, `size`, `peak_memory`), or finer: `latency.p90_ms`,
    `fidelity.parent.kl.p99`."""
    setting: str | None
    """Such as `batch_size=8,sequence_length=128,threads=1`."""
    unit: str
    """`ms`, `bytes`, `1/s`, or empty for the metric's own."""
    value: float
    low: float | None = None
    """The interval's ends, where it has one."""
    high: float | None = None
    n: int | None = None

    @property
    def host_bound(self) -> bool:
        return self.metric.partition(".")[0] in HOST_BOUND


def quantities(document: Mapping[str, Any]) -> Iterator[Quantity]:
    """By artifact and metric, whatever the order of the document's keys (on the disk they are sorted). What was not
    measured, or is no number, is left out."""
    for artifact in document["artifacts"]:
        yield from _of_artifact(artifact)


def _of_artifact(artifact: Mapping[str, Any]) -> Iterator[Quantity]:
    name = str(artifact["name"])
    yield Quantity(name, "size", None, "bytes", artifact["size_bytes"])
    yield Quantity(name, "bits_per_weight", None, "", artifact["bits_per_weight"])
    for metric, score in sorted(artifact["scores"].items()):
        if metric == "latency":
            for timed in score or ():
                yield from _of_time(name, timed)
        elif metric == "fidelity":
            for path, value in _numbers(score, metric):
                yield Quantity(name, path, None, "", value)
        elif isinstance(score, Mapping):
            if _is_number(score.get("value")):
                low, high = score.get("ci") or (None, None)
                yield Quantity(name, metric, None, "", score["value"], low, high, score.get("n"))
        elif _is_number(score):
            stem, _, unit = metric.rpartition("_")
            yield (
                Quantity(name, stem, None, unit, score) if unit == "bytes" else Quantity(name, metric, None, "", score)
            )


def _of_time(name: str, timed: Mapping[str, Any]) -> Iterator[Quantity]:
    phase = str(timed.get("phase", "latency"))
    setting = ",".join(f"{key}={timed[key]}" for key in SETTINGS if key in timed)
    for key, value in sorted(timed.items()):
        if key in (*SETTINGS, "phase", "samples") or not _is_number(value):
            continue
        unit = "ms" if key.endswith("_ms") else "1/s"
        n = timed.get("samples")
        yield Quantity(name, phase if key == "p50_ms" else f"{phase}.{key}", setting, unit, value, n=n)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items()):
            if key != "n":
                yield from _numbers(inner, f"{path}.{key}")
    elif _is_number(value):
        yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
