"""Planted regressions, as `benchmarks/regressions.py` makes them, with few rows and no clocks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from optimize import stages
from optimize.evaluate import host


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """The benchmark's module."""
    path = Path(__file__).parents[2] / "benchmarks" / "regressions.py"
    spec = importlib.util.spec_from_file_location("regressions", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["regressions"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planting(planted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The same with its stages and runtimes installed, for the tests of one file."""

    def forget() -> None:
        stages.entries.cache_clear()
        host.fingerprint.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")  # as it is now, put back in the end
        patch.setattr(sys, "path", [*sys.path])
        planted.install(tmp_path_factory.mktemp("planted") / "site")
        forget()
        yield planted
    forget()
    for name in [name for name in sys.modules if name.partition(".")[0] == "planted_stage"]:
        del sys.modules[name]
