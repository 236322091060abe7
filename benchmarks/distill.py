"""Does the teacher help? The same student with and without distillation, over several seeds.

    python benchmarks/distill.py [--seeds 5] [--rows N] [--epochs N] [--work FOLDER]

The student of `recipes/minilm-student.yaml` is trained twice for every seed (its dropout and the order of the rows):
once as the recipe says, once on the labels alone, with the same student to begin with and the same schedule. Both
answer the same evaluation rows. Printed are each seed's accuracies and their difference with its interval over rows
(Tango, as gates have it), and, which counts, the mean difference over seeds with a 90 % interval of Student's t: it
says whether another seed would show the same.

What was trained is kept in the work folder: a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "minilm-student.yaml"
TEACHING = ("teacher", "temperature", "alpha", "top_k", "cache_teacher", "hidden", "attention", "layer_map")
"""Settings of the student's training that are about the teacher."""


def recipe(seed: int, rows: int | None, epochs: float | None) -> dict[str, Any]:
    """Teacher, student, and the student `taught` and `alone`: on the same schedule, step by step."""
    from optimize.recipe import load

    document = load(RECIPE).document()
    stages = {stage["name"]: stage for stage in document["stages"]}
    taught = [{**stages[name], "seed": seed} for name in ("features", "taught")]
    for stage in taught if epochs is not None else ():
        stage["epochs"] = epochs
    alone = [{name: value for name, value in stage.items() if name not in TEACHING} for stage in taught]
    alone[0] |= {"distill": "finetune", "name": "labels"}
    alone[1] |= {"distill": "finetune", "name": "alone", "from": "labels"}
    document |= {
        "name": "student-with-and-without",
        "stages": [stages["teacher"], stages["student"], *taught, *alone],
        "baseline": "alone",
        "evaluate": {"metrics": ["accuracy"], "latency": None, "peak_memory": False},
        "gates": [{"metric": "accuracy", "on": "taught", "over": "alone", "max_drop": 1}],
        "promote": None,
    }
    if rows is not None:
        document["data"]["max_rows"] = rows
    return document


def interval(differences: list[float], level: float = 0.9) -> tuple[float, float]:
    """Of the mean of paired differences, by Student's t."""
    from scipy.stats import t

    half = t.ppf((1 + level) / 2, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="of the data, instead of all")
    parser.add_argument("--epochs", type=float, help="of each step of the student's training, instead of the recipe's")
    parser.add_argument("--work", type=Path, default=Path(".optimize"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("a mean over seeds needs at least two")

    import optimize

    found = []
    print(f"{'seed':>4}  {'teacher':>7}  {'alone':>7}  {'taught':>7}  difference, 90 % interval over rows")
    for seed in range(given.seeds):
        run = optimize.apply(recipe(seed, given.rows, given.epochs), work=given.work)
        scores = {one["name"]: one["scores"]["accuracy"]["value"] for one in run.document["artifacts"]}
        (gate,) = run.document["gates"]
        low, high = gate["ci"]
        found.append({"seed": seed, **scores, "difference": gate["estimate"], "ci": [low, high]})
        shown = "  ".join(f"{scores[name]:7.4f}" for name in ("teacher", "alone", "taught"))
        print(f"{seed:>4}  {shown}  {gate['estimate']:+.4f} [{low:+.4f}, {high:+.4f}]", flush=True)
    differences = [one["taught"] - one["alone"] for one in found]
    low, high = interval(differences)
    mean = statistics.fmean(differences)
    print(f"taught - alone over {len(found)} seeds: {mean:+.4f}, 90 % interval [{low:+.4f}, {high:+.4f}]")
    kept = statistics.fmean(one["taught"] / one["teacher"] for one in found)
    print(f"the taught student keeps {100 * kept:.1f} % of the teacher's accuracy")
    if given.json:
        text = json.dumps({"seeds": found, "mean": mean, "ci": [low, high], "kept": kept}, indent=2)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
