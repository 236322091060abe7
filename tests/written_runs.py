"""Runs as they lie on the disk, made up: two artifacts, two gates."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

HOST: dict[str, Any] = {
    "cpu": {"model": "Pico 1", "cores": 2, "flags": ["avx2"], "machine": "x86_64", "quota": None},
    "memory_bytes": 8_000_000_000,
    "os": "Linux 6",
    "python": "3.11.7",
    "libraries": {"torch": "2.13.0"},
}
SETTING = "batch_size=8,sequence_length=128,threads=1"
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "pico",
    "model": {"source": "./model", "task": "text-classification"},
    "data": {"source": "rows.csv", "splits": {"train": 0.5, "evaluation": 0.5}},
    "stages": [
        {"distill": "finetune", "name": "teacher", "from": "source", "epochs": 2.0, "report_to": []},
        {"quantize": "int8", "name": "int8", "from": "teacher", "mode": "dynamic"},
    ],
    "baseline": "teacher",
    "evaluate": {"metrics": ["accuracy"]},
    "gates": [{"metric": "accuracy", "max_drop": 0.02}],
    "promote": None,
}


def run_id(number: int) -> str:
    """Of the run at that minute of a day."""
    return f"20261101-{number // 60:02}{number % 60:02}00-000000-{number:04x}"


def document(number: int = 0, *, accuracy: float = 0.8, p50_ms: float = 5.0, **changed: Any) -> dict[str, Any]:
    """A run.json; `accuracy` and `p50_ms` are those of `int8`."""

    def artifact(name: str, stage: str, digest: str, parent: str, quality: float, time: float) -> dict[str, Any]:
        return {
            "digest": f"sha256:{digest * 64}",
            "key": f"sha256:{'0' * 64}",
            "name": name,
            "stage": stage,
            "parent": f"sha256:{parent * 64}",
            "format": "onnx",
            "path": "/nowhere",
            "cached": False,
            "seconds": 1.5,
            "size_bytes": 5_000_000_000,
            "bits_per_weight": 8.25,
            "scores": {
                "accuracy": {"value": quality, "ci": [quality - 0.01, quality + 0.01], "n": 1000},
                "f1": {"value": None, "ci": [None, None], "n": 0},
                "peak_memory_bytes": 400_000_000,
                "fidelity": {"baseline": {"kl": {"mean": 0.01, "p99": 0.2}, "flips": 3, "n": 1000}},
                "latency": [
                    {
                        "batch_size": 8,
                        "sequence_length": 128,
                        "threads": 1,
                        "mean_ms": time + 0.1,
                        "p50_ms": time,
                        "p90_ms": time + 1,
                        "throughput": 8000 / time,
                        "samples": 32,
                    }
                ],
            },
        }

    pair = {"artifact": "int8", "over": "teacher"}
    faster = {**pair, "metric": "latency", "setting": SETTING, "estimate": 10.0 / p50_ms, "ci": [1.9, None]}
    change = {**pair, "metric": "accuracy", "setting": None, "estimate": accuracy - 0.81, "ci": [-0.015, -0.005]}
    judged = {"verdict": "pass", "on_inconclusive": "fail"}
    found: dict[str, Any] = {
        "schema": 1,
        "run": run_id(number),
        "recipe": "pico",
        "recipe_digest": f"sha256:{'9' * 64}",
        "verdict": "pass",
        "exit_code": 0,
        "error": None,
        "baseline": f"sha256:{'a' * 64}",
        "data": {"evaluation": {"digest": f"sha256:{'7' * 64}", "rows": 1000}},
        "host": HOST,
        "seconds": 12.5,
        "seconds_by": {"stages": 10.0, "scoring": 2.0, "sources": 0.1, "engine": 0.4},
        "artifacts": [
            artifact("teacher", "distill.finetune", "a", "5", 0.81, 10.0),
            artifact("int8", "quantize.int8", "b", "a", accuracy, p50_ms),
        ],
        "comparisons": [{**faster, "unit": "speedup", "n": 6, "confidence": 0.9, "details": {}}],
        "gates": [
            {
                **change,
                **judged,
                "limit": {"max_drop": 0.02},
                "margin": accuracy - 0.79,
                "reason": "accuracy fell by little: met",
            },
            {
                **faster,
                **judged,
                "limit": {"min_speedup": 1.5},
                "margin": 10.0 / p50_ms - 1.5,
                "reason": "2 times as fast: met",
            },
        ],
        "measurement": {},
        "sidecars": {},
        "selected": f"sha256:{'b' * 64}",
        "promoted": {"alias": "production", "version": number + 1, "digest": f"sha256:{'b' * 64}"},
    }
    return {**copy.deepcopy(found), **changed}


def failed(number: int, message: str = "no memory") -> dict[str, Any]:
    """A run that ended in its second stage."""
    error = {"type": "StageError", "message": message, "stage": "int8", "location": None, "hint": None}
    whole = document(number)
    changed = {"verdict": None, "exit_code": 4, "error": error, "promoted": None, "selected": None}
    return {**whole, **changed, "comparisons": [], "gates": [], "artifacts": whole["artifacts"][:1]}


def write(runs: Path, told: dict[str, Any], recipe: dict[str, Any] | None = None) -> Path:
    """The run's folder."""
    folder = runs / told["run"]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(told, sort_keys=True), encoding="utf-8")
    stored = {"base": str(runs.parent), "recipe": recipe or RECIPE}
    (folder / "recipe.json").write_text(json.dumps(stored), encoding="utf-8")
    return folder
