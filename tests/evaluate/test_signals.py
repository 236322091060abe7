from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from optimize.evaluate import signals
from optimize.evaluate.signals import Reading, Usage


def reading(time: float, **counters: object) -> Reading:
    values = {"throttled": 0.0, "pressure": 0.0, "busy": {0: 0.0, 1: 0.0}, "stolen": {0: 0.0, 1: 0.0}, **counters}
    return Reading(time, **values)  # type: ignore[arg-type]


def test_a_machine_left_alone_disturbs_nothing() -> None:
    found = signals.signals(reading(0), reading(10, busy={0: 9.0, 1: 9.7}), Usage(9.6, 0.01, 20), [1])
    assert found["foreign"] == pytest.approx(0.01)
    assert signals.disturbances(found) == []


@pytest.mark.parametrize(
    ("after", "usage", "expected"),
    [
        ({"throttled": 0.5}, Usage(9, 0, 0), ["throttled"]),
        ({"pressure": 2.0}, Usage(9, 0, 0), ["pressure"]),
        ({"stolen": {0: 0.0, 1: 1.0}}, Usage(9, 0, 0), ["stolen"]),
        ({"busy": {0: 0.0, 1: 9.9}}, Usage(8, 0, 0), ["foreign"]),
        ({}, Usage(9, 1.0, 0), ["waited"]),
        ({}, Usage(9, 0, 5000), ["switches_per_second"]),
        # Somebody else on a processor that does not measure is nobody's business.
        ({"busy": {0: 10.0, 1: 9.0}, "stolen": {0: 5.0, 1: 0.0}}, Usage(9, 0, 0), []),
    ],
)
def test_each_signal_is_seen(after: dict[str, object], usage: Usage, expected: list[str]) -> None:
    found = signals.signals(reading(0), reading(10, **after), usage, [1])
    assert signals.disturbances(found) == expected


def test_what_the_system_does_not_tell_is_left_out() -> None:
    silent = {"throttled": None, "pressure": None, "busy": {}, "stolen": {}}
    found = signals.signals(reading(0, **silent), reading(1, **silent), Usage(1, None, 0), [])
    assert found == {"switches_per_second": 0.0}


def test_usage_adds_up_and_unknown_stays_unknown() -> None:
    usage = Usage()
    usage.add(1.0, 0.5, 2)
    usage.add(1.0, 0.5, 3)
    assert usage == Usage(2.0, 1.0, 5)
    usage.add(1.0, None, 0)
    assert usage.waited is None


@pytest.mark.parametrize("text", ["usage_usec 5\nthrottled_usec 2500000", "nr_periods 3\nthrottled_time 2500000000"])
def test_throttling_in_both_versions_of_control_groups(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.stat").write_text(text)
    monkeypatch.setattr(signals, "control_groups", lambda controller: iter([tmp_path / "gone", tmp_path, tmp_path]))
    assert signals.read().throttled == 5.0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_quietest_cores_are_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    assert set(signals.quietest_cores(1, seconds=0.01)) <= allowed
    assert signals.quietest_cores(len(allowed)) == tuple(sorted(allowed))
    ticks = iter([{0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}, {0: 0.0, 1: 0.2, 2: 0.1, 3: 0.1}])
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(signals, "_processors", lambda: (next(ticks), {}))
    assert signals.quietest_cores(3, seconds=0) == (0, 2, 3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc here")
def test_counters_move_while_we_burn() -> None:
    before = signals.read()
    end = time.perf_counter() + 0.15
    while time.perf_counter() < end:
        pass
    after = signals.read()
    assert after.time - before.time >= 0.15
    assert sum(after.busy.values()) - sum(before.busy.values()) >= 0.05
