"""A run.json with three artifacts of one chain, whose numbers can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest
from results import BATCH_1, BATCH_8, NASTY, artifact, compared, gate


@pytest.fixture
def document() -> dict[str, Any]:
    """The baseline `teacher`; `onnx` is certainly slower than `int8`, as accurate as can be told, and larger."""
    return {
        "schema": 1,
        "run": "r1",
        "recipe": "tiny",
        "verdict": "inconclusive",
        "error": None,
        "baseline": "sha256:teacher",
        "selected": f"sha256:{NASTY}",
        "promoted": None,
        "exit_code": 3,
        "artifacts": [
            artifact("teacher", None, 0.80, (20.0, 100.0), 90_000_000),
            artifact("onnx", "teacher", 0.70, (16.0, 80.0), 90_000_000),
            artifact(NASTY, "onnx", 0.79, (5.0, 30.0), 23_000_000),
        ],
        "comparisons": [
            compared("onnx", "teacher", "accuracy", -0.10, [-0.12, -0.08], None),
            compared("onnx", "teacher", "latency", 1.25, [1.2, 1.3], BATCH_1),
            compared("onnx", "teacher", "latency", 1.25, [1.2, 1.3], BATCH_8),
            compared("onnx", "teacher", "size", 1.0, [1.0, 1.0], None),
            compared(NASTY, "teacher", "accuracy", -0.01, [-0.03, 0.01], None),
            compared(NASTY, "teacher", "latency", 4.0, [3.2, 5.0], BATCH_1),
            compared(NASTY, "teacher", "latency", 3.0, [None, 3.5], BATCH_8),
            compared(NASTY, "teacher", "size", 0.25, [0.25, 0.25], None),
            compared(NASTY, "onnx", "latency", 3.2, [3.0, 3.4], BATCH_1),
        ],
        "gates": [
            gate(NASTY, "teacher", "accuracy", {"max_drop": 0.02}, "inconclusive", None),
            gate(NASTY, "onnx", "latency", {"min_speedup": 1.6}, "pass", BATCH_1),
        ],
        "measurement": {"control": {BATCH_1: {"estimate": 0.0, "ci": [-0.01, 0.02]}}},
        "sidecars": {},
    }
