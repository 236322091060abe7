"""The machine's own signals: was it left alone while it measured?

A round of measurement is dropped whole when a signal passes its limit, and before anybody looks at its times: a rule
that looked at the times would choose among results. What a system does not tell is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimize.evaluate.host import control_groups

LIMITS: Mapping[str, float] = {
    "throttled": 0.01,
    "pressure": 0.10,
    "stolen": 0.02,
    "foreign": 0.05,
    "waited": 0.02,
    "switches_per_second": 40.0,
}
"""Signal -> the most that a round may show. All but the last are shares of the time measured.

throttled: the control group was held back (`cpu.stat`); pressure: somebody waited for a processor
(`/proc/pressure/cpu`); stolen: the hypervisor ran somebody else (`/proc/stat`); foreign: somebody else ran on the
processors that measure; waited: the workers were ready and did not run (`schedstat`); switches_per_second: involuntary
ones of the workers."""

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class Reading:
    """Counters at one moment, in seconds; None where the system does not tell."""

    time: float
    throttled: float | None
    pressure: float | None
    busy: Mapping[int, float]
    """Processor -> seconds it has run somebody."""
    stolen: Mapping[int, float]


@dataclass
class Usage:
    """What the workers themselves used while measured."""

    cpu: float = 0.0
    waited: float | None = 0.0
    switches: int = 0

    def add(self, cpu: float, waited: float | None, switches: int) -> None:
        self.cpu += cpu
        self.waited = None if waited is None or self.waited is None else self.waited + waited
        self.switches += switches


def read() -> Reading:
    busy, stolen = _processors()
    return Reading(time.perf_counter(), _throttled(), _pressure(), busy, stolen)


def signals(before: Reading, after: Reading, usage: Usage, cores: Sequence[int]) -> dict[str, float]:
    """How much of each signal a span of measurement on `cores` saw; see `LIMITS` for the names."""
    span = max(after.time - before.time, 1e-9)
    found: dict[str, float] = {}
    if before.throttled is not None and after.throttled is not None:
        found["throttled"] = (after.throttled - before.throttled) / span
    if before.pressure is not None and after.pressure is not None:
        found["pressure"] = (after.pressure - before.pressure) / span
    known = [core for core in cores if core in before.busy and core in after.busy]
    if known:
        ran = sum(after.busy[core] - before.busy[core] for core in known)
        found["stolen"] = sum(after.stolen[core] - before.stolen[core] for core in known) / span / len(known)
        found["foreign"] = max(0.0, ran - usage.cpu) / span / len(known)
    if usage.waited is not None:
        found["waited"] = usage.waited / span
    found["switches_per_second"] = usage.switches / span
    return {name: round(value, 4) for name, value in found.items()}


def disturbances(found: Mapping[str, float]) -> list[str]:
    """The signals that passed their limit."""
    return [name for name, value in found.items() if value > LIMITS[name]]


def quietest_cores(count: int, seconds: float = 0.2) -> tuple[int, ...]:
    """The `count` processors that ran least just now, of those this process may use; empty where none can be chosen.

    Of equals the last ones: interrupts tend to be served by the first.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) <= count:
        return tuple(allowed)
    before = _processors()[0]
    time.sleep(seconds)
    after = _processors()[0]
    return tuple(sorted(sorted(allowed, key=lambda core: (after.get(core, 0) - before.get(core, 0), -core))[:count]))


def _processors() -> tuple[dict[int, float], dict[int, float]]:
    busy, stolen = {}, {}
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}, {}
    for line in lines:
        name, *columns = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _wait, interrupts, soft, steal = (int(column) / TICKS for column in columns[:8])
            busy[int(name[3:])] = user + nice + system + interrupts + soft
            stolen[int(name[3:])] = steal
    return busy, stolen


def _throttled() -> float | None:
    """Every level with a quota counts what it held back itself."""
    found = []
    for folder in control_groups("cpu"):
        try:
            counters = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if "throttled_usec" in counters:
            found.append(int(counters["throttled_usec"]) / 1e6)
        elif "throttled_time" in counters:
            found.append(int(counters["throttled_time"]) / 1e9)
    return sum(found) if found else None


def _pressure() -> float | None:
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return None
