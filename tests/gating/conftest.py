"""Planted regressions, as `benchmarks/regressions.py` makes them, with few rows and no clocks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """The benchmark's module."""
    path = Path(__file__).parents[2] / "benchmarks" / "regressions.py"
    if "regressions" not in sys.modules:
        spec = importlib.util.spec_from_file_location("regressions", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["regressions"] = module
        spec.loader.exec_module(module)
    return sys.modules["regressions"]
