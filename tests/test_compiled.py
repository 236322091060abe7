"""What is compiled is kept, where it can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numba import config

from optimize.compiled import compiled


def half(values: np.ndarray) -> float:
    return float(values[0] / values[1])


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", "")


def test_it_is_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path))
    for _ in range(2):  # compiled, then read
        assert compiled("float64(float32[:])")(half)(np.array([1, 2], np.float32)) == 0.5
    assert len(list(tmp_path.glob("kernels/**/*.nbc"))) == 1


def test_a_cache_folder_that_can_not_be_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("OPTIMIZE_CACHE", str(blocked))
    divide = compiled("float64(float32[:])")(half)
    assert divide(np.array([1, 0], np.float32)) == np.inf
    assert blocked.read_bytes() == b""
