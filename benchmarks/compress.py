"""Methods side by side: what each costs in quality and in time, and what it brings in speed and size.

    python benchmarks/compress.py [--models minilm smollm2] [--methods int8 student ...] [--work FOLDER] [--json FILE]
    python benchmarks/compress.py --small          # few rows, one short epoch: does it run?

MiniLM, fine-tuned on the quickstart's film reviews, and SmolLM2-135M on WikiText-2. Each method is a chain of the
tool's own stages behind the same model, listed in `SUBJECTS` as a recipe would have them; chains that begin alike
share their beginning. First everything is made. Then all artifacts are scored in one measurement, as `optimize apply`
does it: on the same evaluation rows, and timed in fresh processes that take turns. Differences and speed-ups are over
the uncompressed model in PyTorch, with 90 % intervals.

`made in` is what the method's own stages took, as the store has it, without the fine-tuning that all share. A method
that needs what is not installed, or that fails, is listed with its reason. What was made is kept in the work folder: a
second run measures the same artifacts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"
ONNX = {"export": "onnx"}
INT8 = {"quantize": "int8", "mode": "dynamic"}
STUDENT = [
    {"distill": "student", "num_hidden_layers": 3, "layers": "uniform"},
    {"distill": "features", "hidden": {"weight": 1}, "attention": {"weight": 1}, "epochs": 3, "learning_rate": 2e-4},
    {"distill": "logits", "epochs": 1, "learning_rate": 5e-5},
]
RECOVERY = {"epochs": 1, "learning_rate": 5e-5, "batch_size": 32}
PRUNED = [{"prune": "structured", "pruning_ratio": 0.3, "round_to": 32, "steps": 2, "recovery": RECOVERY}]
SHALLOW = [{"prune": "layers", "num_hidden_layers": 4, "recovery": RECOVERY}]


@dataclass(frozen=True)
class Subject:
    """A model, its rows, and the methods that it is compressed by."""

    recipe: str
    """Whose model, data and first stage are taken."""
    base: str
    """What all methods start from: a stage of that recipe, or `source`."""
    metric: str
    speed: str
    """The metric of time that the table shows."""
    methods: Mapping[str, Sequence[Mapping[str, Any]]]


SUBJECTS = {
    "minilm": Subject(
        recipe="quickstart",
        base="teacher",
        metric="accuracy",
        speed="latency",
        methods={
            "onnx": [ONNX],
            "int8": [ONNX, INT8],
            "int8-static": [ONNX, {"quantize": "int8", "mode": "static", "smooth_quant": 0.5}],
            "int8-qat": [
                {"quantize": "int8", "mode": "qat", "backend": "onnxruntime", "epochs": 1, "learning_rate": 2e-5}
            ],
            "openvino": [{"export": "openvino"}],
            "openvino-int8": [{"export": "openvino"}, {"quantize": "int8"}],
            "torchao-int8": [{"quantize": "int8", "backend": "torchao"}],
            "gptq-4bit": [{"quantize": "gptq", "bits": 4, "group_size": 64}],
            "sparsegpt-0.5": [{"prune": "unstructured", "importance": "sparsegpt", "sparsity": 0.5}],
            "student": [*STUDENT, ONNX],
            "student-int8": [*STUDENT, ONNX, INT8],
            "pruned-0.3": [*PRUNED, ONNX],
            "pruned-0.3-int8": [*PRUNED, ONNX, INT8],
            "4-of-6-layers": [*SHALLOW, ONNX],
            "4-of-6-layers-int8": [*SHALLOW, ONNX, INT8],
        },
    ),
    "smollm2": Subject(
        recipe="smollm2-gptq",
        base="source",
        metric="perplexity",
        speed="decode",
        methods={
            "bfloat16": [{"quantize": "cast", "dtype": "bfloat16"}],
            "onnx": [ONNX],
            "int8": [ONNX, INT8],
            "int4": [ONNX, {"quantize": "int4", "block_size": 64}],
            "bitsandbytes-int8": [{"quantize": "int8", "backend": "bitsandbytes"}],
            "nf4": [{"quantize": "nf4", "block_size": 64}],
            "gptq-4bit": [{"quantize": "gptq", "bits": 4, "group_size": 64}],
            "gptq-4bit-onnx": [{"quantize": "gptq", "bits": 4, "group_size": 64}, {**ONNX, "lm_head": "int8"}],
            "gptq-3bit-onnx": [{"quantize": "gptq", "bits": 3, "group_size": 64}, {**ONNX, "lm_head": "int8"}],
            "magnitude-0.5": [{"prune": "unstructured", "importance": "magnitude", "sparsity": 0.5}],
            "wanda-0.5": [{"prune": "unstructured", "importance": "wanda", "sparsity": 0.5}],
            "sparsegpt-0.5": [{"prune": "unstructured", "importance": "sparsegpt", "sparsity": 0.5}],
            "sparsegpt-gptq-onnx": [
                {"prune": "unstructured", "importance": "sparsegpt", "sparsity": 0.5},
                {"quantize": "gptq", "bits": 4, "group_size": 64},
                {**ONNX, "lm_head": "int8"},
            ],
            "27-of-30-layers": [{"prune": "layers", "num_hidden_layers": 27, "importance": "angular"}, ONNX],
        },
    ),
}
TRAINS = ("finetune", "features", "logits")


@dataclass(frozen=True)
class Plan:
    """A recipe with every method's chain, and each one's stages, the last of which is its artifact."""

    document: dict[str, Any]
    stages: dict[str, list[str]]


def chains(subject: Subject, methods: Sequence[str], given: argparse.Namespace) -> Plan:
    """One recipe of these methods. Chains that begin with the same stages share them."""
    from optimize.recipe import load

    document = load(RECIPES / f"{subject.recipe}.yaml").document()
    names = [stage["name"] for stage in document["stages"]]
    stages = [] if subject.base == "source" else document["stages"][: names.index(subject.base) + 1]
    made: dict[str, dict[str, Any]] = {}
    of: dict[str, list[str]] = {}
    for method, chain in subject.methods.items():  # all of them, so that a stage's name is always the same
        parent = subject.base
        for number, stage in enumerate(chain):
            block = {**stage, "from": parent}
            if stage.get("distill") in ("features", "logits"):
                block |= {"teacher": subject.base, "temperature": 2, "alpha": 0.7, "batch_size": 32}
            name = method if number == len(chain) - 1 else f"{method}-{number}"
            own = made.setdefault(json.dumps(block, sort_keys=True), {**block, "name": name})
            parent = own["name"]
            of.setdefault(method, []).append(parent)
    needed = {name for method in methods for name in of[method]}
    stages += [stage for stage in made.values() if stage["name"] in needed]
    document |= {"name": f"compress-{subject.recipe}", "stages": stages, "baseline": subject.base}
    document |= {"gates": [], "promote": None}
    timed = {"latency": latency(subject, given), "peak_memory": not (given.small or given.no_latency)}
    document["evaluate"] = {"metrics": [subject.metric], "fidelity": False, **timed}
    limit, few = ("max_windows", 4) if subject.metric == "perplexity" else ("max_rows", 400)
    if given.rows is not None or given.small:
        document["data"][limit] = given.rows or few
    for stage in stages if given.small else ():
        shrink(stage)
    return Plan(document, {method: of[method] for method in methods})


def latency(subject: Subject, given: argparse.Namespace) -> dict[str, Any] | None:
    if given.no_latency:
        return None
    common = {"threads": given.threads, "budget_seconds": given.budget_seconds}
    if given.small:
        common |= {"half_width": 1.0, "budget_seconds": min(given.budget_seconds, 60.0)}
    if subject.speed == "latency":
        return {**common, "batch_sizes": [1], "sequence_length": 32 if given.small else 128}
    lengths = (16, 8) if given.small else (128, 64)
    return {**common, "prefill": [lengths[0]], "decode": {"prompt_length": lengths[0], "new_tokens": lengths[1]}}


def shrink(stage: dict[str, Any]) -> None:
    """A stage that runs in seconds, and whose figures mean nothing."""
    if stage.get("distill") in TRAINS or stage.get("mode") == "qat":
        stage["epochs"] = 0.1
    if "recovery" in stage:
        stage["recovery"] = {**stage["recovery"], "epochs": 0.1}
        stage["steps"] = 1
        stage.pop("steps") if stage.get("prune") == "layers" else None
    calibrated = ("gptq", "unstructured", "structured", "layers")
    if stage.get("quantize") in calibrated or stage.get("prune") in calibrated or stage.get("mode") == "static":
        stage["calibration"] = {"num_samples": 8, "max_length": 64}


def make(subject: Subject, methods: Sequence[str], given: argparse.Namespace, work: Any) -> tuple[Plan, dict[str, str]]:
    """(the plan of the methods that could be made, the reasons of the others). What is made lies in the store."""
    from optimize import engine
    from optimize.errors import OptimizeError
    from optimize.progress_view import listening
    from optimize.recipe import load

    failed: dict[str, str] = {}
    for method in methods:
        plan = chains(subject, [method], given)
        try:
            recipe = load(plan.document, env=False, base=RECIPES)
            with listening() as progress:
                engine.build(recipe, plan.stages[method][-1], work, progress)
        except OptimizeError as error:
            diagnostics = getattr(error, "diagnostics", ())
            failed[method] = diagnostics[0].message if diagnostics else error.message
    return chains(subject, [one for one in methods if one not in failed], given), failed


def score(subject: Subject, plan: Plan, work: Any) -> dict[str, Any]:
    """A document like a run.json, with an artifact for each method and the baseline: all scored in one measurement."""
    from optimize import planning, tasks
    from optimize.data import prepare
    from optimize.progress_view import listening
    from optimize.recipe import load
    from optimize.run import new_document
    from optimize.scoring import Scoring, describe_artifacts, describe_data
    from optimize.scoring import Subject as Scored

    recipe = load(plan.document, env=False, base=RECIPES)
    steps = {step.name: step for step in planning.plan(recipe, work=work).steps}
    methods = {subject.base: [subject.base], **plan.stages}
    subjects = {}
    for method, stages in methods.items():
        step = steps[stages[-1]]
        assert step.artifact is not None
        own = [work.store.record(steps[name].key)["seconds"] for name in stages]
        subjects[method] = Scored(step.artifact, step.id, None, step.key, True, sum(own))
    source = steps["source"].artifact
    assert source is not None
    document = new_document(recipe)
    data = prepare(recipe.data, tasks.get(recipe.model.task), work, recipe.base)
    document |= {"artifacts": describe_artifacts(subjects, source), "data": describe_data(data)}
    with listening() as progress, work.store.in_use():
        scoring = Scoring(recipe, data, work, progress, False, document, {})
        scoring.score(subjects, baseline=subject.base, leaves=list(plan.stages))
    return document


def rows(subject: Subject, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each artifact: its own values, and what a comparison with the baseline says."""
    compared: dict[tuple[str, str], Mapping[str, Any]] = {}
    for one in document["comparisons"]:
        if one["unit"] != "absolute":
            compared.setdefault((one["artifact"], one["metric"]), one)
    found = []
    for artifact in document["artifacts"]:
        name, scores = artifact["name"], artifact["scores"]
        quality, speed, size = (compared.get((name, metric)) for metric in (subject.metric, subject.speed, "size"))
        times = [one for one in scores.get("latency") or () if one.get("phase", "latency") == subject.speed]
        found.append(
            {
                "method": name,
                "format": artifact["format"],
                subject.metric: scores[subject.metric]["value"],
                "change": quality and {key: quality[key] for key in ("estimate", "ci", "unit")},
                "ms": times[0]["p50_ms"] if times else None,
                "speedup": speed and {key: speed[key] for key in ("estimate", "ci")},
                "peak_memory_bytes": scores.get("peak_memory_bytes"),
                "size_bytes": artifact["size_bytes"],
                "size_ratio": size["estimate"] if size else 1.0,
                "seconds": artifact["seconds"],
                "digest": artifact["digest"],
            }
        )
    return found


def show(subject: Subject, table: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> None:
    heads = (subject.metric, "change [90 %]", "ms", "speed-up [90 %]", "MB", "size", "made in")
    print(
        f"\n{'method':<22}{heads[0]:>11}{heads[1]:>28}{heads[2]:>9}{heads[3]:>22}{heads[4]:>8}{heads[5]:>7}{heads[6]:>10}"
    )
    for row in table:
        change, speed = row["change"], row["speedup"]
        moved = f"{change['estimate']:+.4f}{ends(change['ci'], '+.4f')}" if change else ""
        faster = f"{speed['estimate']:.2f}{ends(speed['ci'], '.2f')}" if speed else ""
        ms = f"{row['ms']:.2f}" if row["ms"] is not None else ""
        size = f"{row['size_bytes'] / 1e6:>8.1f}{row['size_ratio']:>7.2f}{row['seconds']:>8.0f} s"
        print(f"{row['method']:<22}{row[subject.metric]:>11.4f}{moved:>28}{ms:>9}{faster:>22}{size}")
    for method, reason in failed.items():
        print(f"left out: {method}: {reason}")
    sys.stdout.flush()


def ends(ci: Sequence[float | None], form: str) -> str:
    return f" [{', '.join('?' if end is None else format(end, form) for end in ci)}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    known = sorted({method for subject in SUBJECTS.values() for method in subject.methods})
    parser.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help=f"of {', '.join(known)}")
    parser.add_argument("--rows", type=int, help="MiniLM: rows of the data in all; SmolLM2: windows scored")
    parser.add_argument("--threads", type=int, default=1, help="of what is timed")
    parser.add_argument("--budget-seconds", type=float, default=900.0, help="of one model's latency rounds, at most")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--small", action="store_true", help="runs in minutes; its figures mean nothing")
    parser.add_argument("--work", type=Path, default=Path(".optimize"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()

    from optimize.work import Work

    work, told = Work(given.work), {}
    for name in dict.fromkeys(given.models):
        subject = SUBJECTS[name]
        chosen = [method for method in subject.methods if given.methods is None or method in given.methods]
        plan, failed = make(subject, chosen, given, work)
        document = score(subject, plan, work)
        table = rows(subject, document)
        show(subject, table, failed)
        keys = ("host", "data", "measurement", "comparisons")
        told[name] = {"rows": table, "left_out": failed, **{key: document[key] for key in keys}}
    if given.json:
        given.json.write_text(json.dumps({"schema": 1, "models": told}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
