from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimize.evaluate import host


def test_fingerprint_says_what_matters_and_stays_the_same() -> None:
    host.fingerprint.cache_clear()
    found = host.fingerprint()
    assert set(found) == {"cpu", "memory_bytes", "os", "python", "libraries"}
    assert found["cpu"]["model"]
    assert {"numpy", "torch", "onnxruntime", "optimize-workbench"} <= set(found["libraries"])
    assert found["memory_bytes"] > 2**26
    assert host.fingerprint.__wrapped__() == found


@pytest.mark.usefixtures("runtimes_installed")
def test_a_third_partys_runtime_is_among_the_libraries() -> None:
    assert host.fingerprint.__wrapped__()["libraries"]["spoilt"] == "1.0"


def test_fingerprint_is_quick_and_imports_no_library() -> None:
    code = (
        "import sys, optimize.evaluate.host as host; host.fingerprint();"
        "print([name for name in ('torch', 'numpy', 'onnxruntime', 'scipy') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"
    best = min(_seconds(host.fingerprint.__wrapped__) for _ in range(5))
    assert best < 0.1


def _seconds(function) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([{"cpu.max": "max 100000"}], None),
        ([{"cpu.max": "150000 100000"}], 1.5),
        # The tightest level of the hierarchy counts.
        ([{"cpu.max": "400000 100000"}, {"cpu.max": "50000 100000"}, {}], 0.5),
        ([{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}], None),
        ([{"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}], 2.0),
        ([{"cpu.max": "damaged"}], None),
    ],
)
def test_quota_of_the_control_group(
    files: list[dict[str, str]], expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for number, contents in enumerate(files):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        for name, text in contents.items():
            (folders[-1] / name).write_text(text)
    monkeypatch.setattr(host, "control_groups", lambda controller: iter(folders))
    assert host.cpu_quota.__wrapped__() == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (0.5, 1), (1.9, 1), (2.0, 2), (64.0, 4)])
def test_threads_are_bounded_by_affinity_and_quota(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(host, "cpu_quota", lambda: quota)
    assert host.cpu_count.__wrapped__() == expected


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("-1", 0)])
def test_hidden_devices_do_not_count(visible: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert host.cuda_devices() == expected
