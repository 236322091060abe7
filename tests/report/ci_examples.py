"""One document of each way a run can end: what `apply` and `gate` write, with the numbers of real runs."""

from __future__ import annotations

import copy
from typing import Any

SETTINGS = ("batch_size=1,sequence_length=128,threads=1", "batch_size=8,sequence_length=128,threads=1")
BEFORE, AFTER = "sha256:" + "4cf5" * 16, "sha256:" + "81a0" * 16
CONTROL = {"estimate": -0.007, "ci": [-0.018, 0.004]}


def gate(metric: str, limit: dict[str, float], estimate: float, ci: tuple[float, float], **more: Any) -> dict[str, Any]:
    ((name, bound),) = limit.items()
    edge, side = (-bound, 1) if name == "max_drop" else (bound, -1 if name.startswith("max") else 1)
    return {
        **{"metric": metric, "artifact": "int8", "over": "teacher", "setting": None, "limit": limit},
        **{"estimate": estimate, "ci": list(ci), "margin": side * (estimate - edge), "verdict": "pass"},
        **{"reason": f"{metric} of int8 is {estimate:+.4g} from that of teacher: met", "on_inconclusive": "fail"},
        **{"location": "recipes/sentiment.yaml:31:5", "acknowledged": None, **more},
    }


def artifact(name: str, stage: str, digest: str, accuracy: float, milliseconds: float, size: int) -> dict[str, Any]:
    return {
        **{"name": name, "stage": stage, "digest": digest, "key": None, "parent": None, "format": "onnx"},
        **{"path": "/work", "cached": False, "seconds": 12.5, "size_bytes": size, "bits_per_weight": 8.36},
        "scores": {
            "accuracy": {"value": accuracy, "ci": [accuracy - 0.013, accuracy + 0.012], "n": 2560},
            "latency": [
                {
                    **{"batch_size": batch, "sequence_length": 128, "threads": 1, "samples": 96, "throughput": 9.0},
                    **{"p50_ms": milliseconds * batch, "p90_ms": milliseconds * batch * 1.1, "mean_ms": milliseconds},
                }
                for batch in (1, 8)
            ],
            "peak_memory_bytes": 142_766_080,
            "fidelity": {},
        },
    }


def passing() -> dict[str, Any]:
    gates = [
        gate("accuracy", {"max_drop": 0.02}, 0.00039, (-0.00284, 0.00366)),
        *(
            gate("latency", {"min_speedup": 1.5}, speed, (speed * 0.98, speed * 1.02), setting=setting, over="onnx")
            for speed, setting in zip((3.01, 2.81), SETTINGS, strict=True)
        ),
        gate("size", {"max_ratio": 0.35}, 0.2592, (0.2592, 0.2592)),
    ]
    gates[3]["location"] = "recipes/sentiment.yaml:34:5"
    return {
        **{"schema": 1, "run": "20261120-195557-710980-9876", "recipe": "sentiment", "recipe_digest": AFTER},
        **{"recipe_file": "recipes/sentiment.yaml", "verdict": "pass", "exit_code": 0, "error": None},
        "baseline": "sha256:" + "de0b" * 16,
        "data": {"train": {"digest": AFTER, "rows": 5118}, "evaluation": {"digest": BEFORE, "rows": 2560}},
        "host": {
            "cpu": {"model": "Example CPU 6/167/1", "cores": 2, "flags": [], "machine": "x86_64", "quota": None},
            **{"memory_bytes": 25_276_502_016, "os": "Linux 6.18", "python": "3.11.7"},
            "libraries": {"numpy": "2.2.6", "onnxruntime": "1.31.1"},
        },
        **{"seconds": 127.563, "seconds_by": {"stages": 42.5, "scoring": 84.8, "engine": 0.3}},
        "artifacts": [
            artifact("teacher", "distill.finetune", "sha256:" + "de0b" * 16, 0.8078, 33.8, 91_581_112),
            artifact("onnx", "export.onnx", BEFORE, 0.8078, 24.1, 91_607_561),
            artifact("int8", "quantize.int8", AFTER, 0.8082, 7.98, 23_734_188),
        ],
        "comparisons": [
            {
                **{name: one[name] for name in ("artifact", "over", "metric", "setting", "estimate", "ci")},
                **{"n": 8 if one["metric"] == "latency" else 2560, "confidence": 0.9, "unit": "difference"},
                "details": {},
            }
            for one in gates
        ],
        "gates": gates,
        "measurement": {"rounds": 8, "dropped": 0, "control": dict.fromkeys(SETTINGS, CONTROL)},
        **{"sidecars": {}, "selected": AFTER, "against": None},
        "promoted": {"alias": "production", "version": 1, "digest": AFTER},
    }


def failing() -> dict[str, Any]:
    """A gate over what is promoted, with a regression that is acknowledged beside one that is not."""
    document = passing()
    document.update(verdict="fail", exit_code=1, promoted=None)
    accuracy, *times, size = document["gates"]
    accuracy.update(
        **{"over": "production", "estimate": -0.031, "ci": [-0.038, -0.0245], "margin": -0.011, "verdict": "fail"},
        reason="accuracy of int8 is -0.031 from that of production (90 % interval -0.038 to -0.0245); a drop of at most"
        " 0.02 is allowed: not met",
    )
    size.update(
        **{"over": "production", "estimate": 1.05, "ci": [1.05, 1.05], "limit": {"max_ratio": 1.02}, "margin": -0.03},
        **{"verdict": "fail", "reason": "size of int8 is 1.05 of that of production; at most 1.02 is allowed: not met"},
        acknowledged={
            **{"reason": "the tokenizer brings its own merges now", "expires": "2026-12-31"},
            "location": "acknowledged.yaml:3:3",
        },
    )
    for one in times:
        one.update(over="production", estimate=1.01, ci=[0.985, 1.035], limit={"min_speedup": 0.95}, margin=0.06)
    promoted = artifact("production", "quantize.int8", "sha256:" + "77aa" * 16, 0.8390, 8.06, 22_603_988)
    document["artifacts"].append(promoted)
    document["against"] = {
        **{"ref": "sentiment@production", "name": "production", "version": 7, "digest": promoted["digest"]},
        **{"run": "20261101-080000-000000-0001", "promoted_at": "2026-11-01T08:02:11+00:00"},
        "changed": {
            "recipe": [{"what": "stages.int8.mode", "before": "static", "after": "dynamic"}],
            "data": [{"what": "train", "before": BEFORE, "after": AFTER}],
            "environment": [{"what": "onnxruntime", "before": "1.30.0", "after": "1.31.1"}],
            "host": [],
        },
        "since": [{"ref": "sentiment@production~5", "name": "production~5", "version": 2, "digest": BEFORE}],
    }
    return document


def inconclusive() -> dict[str, Any]:
    """Nothing is promoted yet; one gate can't tell and one only warns."""
    document = passing()
    document.update(verdict="inconclusive", exit_code=3, promoted=None)
    document["against"] = {
        **{"ref": "sentiment@production", "name": "production", "version": None, "digest": None, "run": None},
        **{"promoted_at": None, "changed": {}, "since": []},
    }
    accuracy, slow, fast, _ = document["gates"]
    accuracy.update(
        **{"estimate": -0.0188, "ci": [-0.0261, -0.0117], "margin": 0.0012, "verdict": "inconclusive"},
        reason="accuracy of int8 is -0.0188 from that of teacher (90 % interval -0.0261 to -0.0117); a drop of at most"
        " 0.02 is allowed: can't tell from 2,560 rows; about 91,000 would settle it",
    )
    slow.update(verdict="inconclusive", on_inconclusive="warn", estimate=1.51, ci=[1.45, 1.57], margin=0.01)
    fast.update(estimate=None, ci=[None, None], margin=None)
    return document


def selected() -> dict[str, Any]:
    """Two leaves, of which one was chosen and measured again; the other failed, which decides nothing."""
    document = passing()
    leaf = copy.deepcopy(document["gates"][0])
    leaf.update(artifact="openvino", estimate=-0.05, ci=[-0.06, -0.04], margin=-0.03, verdict="fail", reason="not met")
    document["confirmation"] = {
        **{"artifact": "int8", "among": ["int8", "openvino"], "gates": copy.deepcopy(document["gates"])},
        "measurement": {"rounds": 6, "dropped": 1, "control": dict.fromkeys(SETTINGS, CONTROL)},
    }
    document["gates"].append(leaf)
    return document


def stage_error() -> dict[str, Any]:
    document = passing()
    document.update(verdict=None, exit_code=4, promoted=None, baseline=None, selected=None)
    document.update(comparisons=[], gates=[], measurement={}, artifacts=document["artifacts"][:2])
    for one in document["artifacts"]:
        one["scores"] = {}
    document["error"] = {
        **{"type": "StageError", "message": "the graph answers differently from the model: by 0.084 (tolerance 0.05)"},
        **{"stage": "int8", "location": "recipes/sentiment.yaml:22:5"},
        "hint": "on a processor without VNNI, 8-bit sums can overflow: set reduce_range: true",
    }
    return document


def recipe_error() -> dict[str, Any]:
    """Of a recipe with mistakes there is no run, but the document of the error alone."""
    mistakes = [
        ("unknown key `epoch`", "stages[0].epoch", "did you mean `epochs`?", 12, 5),
        ("no stage is named `int9`", "gates[0].on", "did you mean `int8`?", 33, 9),
    ]
    return {
        "schema": 1,
        "error": {
            **{"type": "RecipeError", "stage": None, "location": None, "hint": None},
            "message": "recipes/sentiment.yaml has 2 mistakes\nrecipes/sentiment.yaml:12:5: unknown key `epoch`",
            "diagnostics": [
                {
                    **{"message": message, "path": path, "hint": hint, "line": line, "column": column},
                    **{"file": "recipes/sentiment.yaml", "source_line": "    epoch: 1"},
                    "location": f"recipes/sentiment.yaml:{line}:{column}",
                }
                for message, path, hint, line, column in mistakes
            ],
        },
    }


EXAMPLES = {
    **{"pass": passing, "fail": failing, "inconclusive": inconclusive, "selected": selected},
    **{"stage-error": stage_error, "recipe-error": recipe_error},
}
