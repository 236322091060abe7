"""Runs made up for the page: as large as wanted, their numbers from known distributions, every text replaceable.

The sidecars are made by the code that makes those of real runs.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimize.evaluate.timings import CONTROL, Batch, Round, Timings
from optimize.report import sidecars

SETTINGS = (Batch(1, 128, 1), Batch(8, 128, 1))
Say = Callable[[str], str]


def same(text: str) -> str:
    return text


def made_run(
    folder: Path,
    *,
    candidates: int = 3,
    rows: int = 60,
    rounds: int = 6,
    verdict: str | None = "pass",
    error: dict[str, Any] | None = None,
    run: str = "20261120-201534-630937-26cf",
    say: Say = same,
) -> dict[str, Any]:
    """Write run.json, recipe.json and sidecars into `folder`; `say` changes every text that users, data or libraries
    give. The chain forks: all candidates but the first come from the first."""
    chance = random.Random(0)
    names = [say("teacher"), *(say(f"candidate-{i}") for i in range(candidates))]
    digests = {name: f"sha256:{i:064x}" for i, name in enumerate(names)}
    speed = {name: 1.0 if i == 0 else 1.0 + 0.4 * i for i, name in enumerate(names)}
    size = {name: int(90e6 / (1 + 0.3 * i)) for i, name in enumerate(names)}
    quality = {name: 0.9 - 0.0015 * i for i, name in enumerate(names)}
    base, accuracy = names[0], say("accuracy")

    def comparison(name: str, over: str, metric: str, setting: str | None) -> dict[str, Any]:
        if metric == accuracy:
            at, half, unit = quality[name] - quality[over], 0.004, "difference"
        elif metric == "size":
            at, half, unit = size[name] / size[over], 0.0, "ratio"
        else:
            at, half, unit = speed[name] / speed[over], 0.02, "speedup"
        ci = [at - half, at + half]
        return {
            "artifact": name, "over": over, "metric": metric, "setting": setting, "estimate": at, "unit": unit,
            "ci": ci, "n": rows, "confidence": 0.9, "details": {},
        }  # fmt: skip

    parents = {name: names[min(i, 2) - 1] if i else None for i, name in enumerate(names)}
    pairs = [(name, base) for name in names[1:]] + [(n, p) for n, p in parents.items() if p and p != base]
    keys: list[tuple[str, str | None]] = [(accuracy, None), ("size", None), *(("latency", s.label) for s in SETTINGS)]
    artifacts = [
        {
            "digest": digests[name],
            "key": None,
            "name": name,
            "stage": say("quantize.int8" if i else "distill.finetune"),
            "parent": digests.get(parents[name] or ""),
            "format": say("onnx"),
            "path": "/nowhere",
            "cached": bool(i % 2),
            "seconds": 3.0,
            "size_bytes": size[name],
            "bits_per_weight": 32 * size[name] / 90e6,
            "scores": {
                accuracy: {"value": quality[name], "ci": [quality[name] - 0.01, quality[name] + 0.01], "n": rows},
                "latency": [
                    {
                        **s.to_json(),
                        "p50_ms": 40 * s.batch_size / speed[name],
                        "p90_ms": 50 * s.batch_size / speed[name],
                    }
                    for s in SETTINGS
                ],
                "fidelity": {} if i == 0 else {"baseline": _fidelity(i), "parent": _fidelity(i)},
            },
        }
        for i, name in enumerate(names)
    ]
    limits: list[tuple[str, str | None, dict[str, float]]] = [
        (accuracy, None, {"max_drop": 0.02}),
        ("latency", SETTINGS[0].label, {"min_speedup": 1.2}),
        ("size", None, {"max_ratio": 0.8}),
    ]
    gates = [
        {
            **comparison(names[-1], base, metric, setting),
            "limit": limit,
            "margin": 0.01,
            "verdict": verdict or "pass",
            "reason": say(f"{metric} of it: met"),
            "on_inconclusive": "fail",
            "location": say("recipe.yaml:12:3"),
            "acknowledged": None,
        }
        for metric, setting, limit in limits
    ]  # fmt: skip
    document: dict[str, Any] = {
        "schema": 1,
        "run": run,
        "recipe": say("made"),
        "recipe_digest": "sha256:" + "a" * 64,
        "verdict": None if error else verdict,
        "exit_code": 4 if error else 0,
        "error": error,
        "baseline": None if error else digests[base],
        "data": {"evaluation": {"digest": "sha256:" + "b" * 64, "rows": rows}},
        "host": {
            "cpu": {"model": say("A processor"), "cores": 2, "flags": [say("avx2")]},
            "memory_bytes": 25_000_000_000,
            "os": say("Linux"),
            "python": "3.11",
            "libraries": {say("torch"): say("2.13")},
        },
        "seconds": 75.0,
        "seconds_by": {"stages": 70.0, "scoring": 5.0},
        "artifacts": [] if error else artifacts,
        "comparisons": [] if error else [comparison(n, o, metric, s) for n, o in pairs for metric, s in keys],
        "gates": gates if verdict and not error else [],
        "measurement": {} if error else {
            "rounds": rounds, "dropped": 1, "noisy": False,
            "signals": {"stolen": {"limit": 0.02, "median": 0.0, "max": 0.01}},
            "control": {s.label: {"estimate": 0.002, "ci": [-0.004, 0.008]} for s in SETTINGS},
        },
        "metrics": {accuracy: {"higher_is_better": True}},
        "sidecars": {},
        "selected": None if error else digests[names[-1]],
        "promoted": {"alias": say("production"), "version": 3, "digest": "sha256:c"} if verdict == "pass" else None,
    }  # fmt: skip
    if not error:
        tables = {
            "rows": sidecars.rows(_flips(names, rows, chance, say), base, [say("negative"), say("positive")]),
            "samples": sidecars.samples(_timings(names, speed, rounds, chance), {n: n for n in names}),
            "layers": {names[-1]: sidecars.layers({"layers": _layers(say)})},
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            (folder / f"{name}.json").write_text(json.dumps(table, allow_nan=False), encoding="utf-8")
            document["sidecars"][name] = {"path": f"{name}.json", "digest": "sha256:0"}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "version": 1,
        "name": document["recipe"],
        "stages": [{"quantize": "int8", "name": "int8", "bits": candidates}],
    }
    (folder / "recipe.json").write_text(json.dumps({"base": "/", "recipe": recipe}), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    return document


def _fidelity(i: int) -> dict[str, Any]:
    spread = {"mean": 2e-4 * i, "median": 1e-4 * i, "p99": 2e-3 * i, "p999": 5e-3 * i, "max": 1e-2 * i}
    return {"n": 100, "kl": spread, "flips": i, "flip_rate": i / 100}


def _flips(names: list[str], rows: int, chance: random.Random, say: Say) -> dict[str, list[dict[str, Any]]]:
    """Every row is answered otherwise by every candidate: the most that there can be."""
    said = [say("negative"), say("positive")]
    words = [
        "a",
        "film",
        "of",
        "quiet",
        "wit",
        "whose",
        "last",
        "act",
        "all",
        "but",
        "forgets",
        "what",
        "it",
        "set",
        "out",
        "to",
        "say",
        "about",
        "its",
        "people",
    ]
    texts = [say(" ".join(chance.choices(words, k=chance.randint(6, 40)))) for _ in range(rows)]
    return {
        name: [
            {
                "row": row,
                "text": texts[row],
                "label": row % 2,
                "baseline": {"label": said[row % 2], "score": 0.75},
                "candidate": {"label": said[1 - row % 2], "score": 0.5 + chance.random() / 2},
            }
            for row in range(rows)
        ]
        for name in names[1:]
    }


def _timings(names: list[str], speed: dict[str, float], rounds: int, chance: random.Random) -> Timings:
    def turns(slot: str, setting: Batch) -> list[list[float]]:
        middle = 0.040 * setting.batch_size / speed.get(slot, 1.0) * math.exp(chance.gauss(0, 0.01))
        return [[middle * math.exp(abs(chance.gauss(0, 0.05))) for _ in range(20)] for _ in range(4)]

    slots = [*names, CONTROL]
    return Timings(
        slots=names,
        baseline=names[0],
        settings=list(SETTINGS),
        fewest=rounds,
        rounds=[
            Round({s.label: {slot: turns(slot, s) for slot in slots} for s in SETTINGS}, {}, {}, [], [], True)
            for _ in range(rounds)
        ],
    )


def _layers(say: Say) -> list[dict[str, Any]]:
    kinds = [say("q_proj"), say("v_proj"), say("fc1")]
    return [
        {"name": f"model.layers.{block}.{kind}", "error": 1e-4 * (1 + block) * (i + 1), "rtn_error": 3e-4 * (1 + block)}
        for block in range(6)
        for i, kind in enumerate(kinds)
    ]
