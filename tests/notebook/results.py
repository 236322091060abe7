"""A run.json in parts."""

from __future__ import annotations

from typing import Any

BATCH_1 = "batch_size=1,sequence_length=128,threads=1"
BATCH_8 = "batch_size=8,sequence_length=128,threads=1"
NASTY = "int8<script>alert(1)</script>\x1b[31m$x$"


def artifact(name: str, parent: str | None, accuracy: float, times: tuple[float, float], size: int) -> dict[str, Any]:
    latency = [
        {"batch_size": b, "sequence_length": 128, "threads": 1, "p50_ms": ms, "p90_ms": ms * 1.1, "samples": 96}
        for b, ms in zip((1, 8), times, strict=True)
    ]
    return {
        "name": name,
        "digest": f"sha256:{name}",
        "parent": parent and f"sha256:{parent}",
        "stage": "quantize.int8",
        "format": "onnx",
        "size_bytes": size,
        "bits_per_weight": 8.0,
        "seconds": 1.0,
        "cached": False,
        "scores": {
            "accuracy": {"value": accuracy, "ci": [accuracy - 0.02, accuracy + 0.02], "n": 1000},
            "latency": latency,
            "peak_memory_bytes": 10**8,
            "fidelity": {},
        },
    }


def compared(name: str, over: str, metric: str, estimate: float, ci: list[Any], setting: str | None) -> dict[str, Any]:
    unit = {"accuracy": "difference", "size": "ratio"}.get(metric, "speedup")
    return {
        **{"artifact": name, "over": over, "metric": metric, "setting": setting, "unit": unit},
        **{"estimate": estimate, "ci": ci, "n": 1000, "confidence": 0.9, "details": {}},
    }


def gate(
    name: str, over: str, metric: str, limit: dict[str, float], verdict: str, setting: str | None
) -> dict[str, Any]:
    return {
        **{"artifact": name, "over": over, "metric": metric, "setting": setting, "limit": limit, "verdict": verdict},
        **{"estimate": 0.0, "ci": [-0.1, 0.1], "margin": 0.1, "reason": "because"},
    }
