"""From artifacts to the scores, comparisons and gate results of a `run.json`; `apply` and `compare` share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import runtimes, tasks
from optimize.recipe import SOURCE
from optimize.recipe.limits import RELATIVE
from optimize.report.sidecars import write as write_sidecars

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.data import Data
    from optimize.evaluate import Evaluation
    from optimize.evaluate.types import GateResult
    from optimize.progress import Progress
    from optimize.recipe import Gate, Recipe
    from optimize.work import Work


Judging = Callable[["Sequence[Gate]"], "list[GateResult]"]
"""Gates held against what was measured."""


@dataclass(frozen=True)
class Subject:
    """An artifact to be scored, and how it came to be here."""

    artifact: Artifact
    stage: str
    """What made it, such as `quantize.int8`."""
    parent: str | None = None
    """The name of the subject it was made from."""
    key: str | None = None
    cached: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Scoring:
    """What scoring needs besides the artifacts, and the `run.json` that it fills in."""

    recipe: Recipe
    data: Data
    work: Work
    progress: Progress
    remeasure: bool
    document: dict[str, Any]
    sidecars: dict[str, Path]
    acknowledge: Callable[[Judging, list[GateResult]], list[GateResult]] = lambda judging, results: results
    """Marks the results that a reviewed line lets pass for now; it may judge the same evidence by other limits."""

    def score(
        self, subjects: Mapping[str, Subject], *, baseline: str, leaves: Sequence[str]
    ) -> tuple[Evaluation, list[GateResult]]:
        """Measure the subjects, judge the recipe's gates on the leaves, and write both into `document`."""
        from optimize.evaluate.gates import judge

        recipe, document = self.recipe, self.document
        evaluation = self._evaluate(
            subjects,
            parents={name: one.parent for name, one in subjects.items() if one.parent and one.parent in subjects},
            baseline=baseline,
            pairs=gated_pairs(recipe.gates, leaves, baseline),
            settings=recipe.evaluate,
        )
        document["measurement"] = evaluation.measurement
        document["baseline"] = subjects[baseline].artifact.digest
        document["metrics"] = {
            name: {"higher_is_better": metric.higher_is_better} for name, metric in evaluation.metrics.items()
        }
        artifacts = {name: one.artifact for name, one in subjects.items()}
        drawn = write_sidecars(artifacts, baseline, evaluation.sidecars, self.work.scores)
        self.sidecars.update({**evaluation.sidecars, **drawn})
        for described in document["artifacts"]:
            described["scores"] = evaluation.scores[described["name"]]
        select = recipe.promote.select if recipe.promote else None

        def judging(gates: Sequence[Gate]) -> list[GateResult]:
            return judge(gates, evaluation, leaves=leaves, baseline=baseline, select=select)

        results = self.acknowledge(judging, judging(recipe.gates))
        document["comparisons"] = _describe_comparisons(evaluation, subjects, baseline, results)
        document["gates"] = [result.to_json() for result in results]
        return evaluation, results

    def confirm(self, subjects: Mapping[str, Subject], chosen: str, *, leaves: Sequence[str]) -> list[GateResult]:
        """Measure the leaf that a selection picked once more, apart from the times it was picked for, and judge it.

        The best of several is partly the luckiest of several; this time there is nothing to pick.
        """
        from optimize.evaluate.gates import judge

        baseline = self.recipe.baseline
        gates = [
            gate.model_copy(update={"on": chosen}) for gate in self.recipe.gates if _judges(gate, chosen, baseline)
        ]
        needed = {chosen, baseline, *(gate.over for gate in gates if gate.over)}
        evaluation = self._evaluate(
            {name: subject for name, subject in subjects.items() if name in needed},
            parents={},
            baseline=baseline,
            pairs=gated_pairs(gates, [chosen], baseline),
            settings=self.recipe.evaluate.model_copy(update={"fidelity": False}),
            again=True,
        )

        def judging(asked: Sequence[Gate]) -> list[GateResult]:
            return judge(asked, evaluation, leaves=[chosen], baseline=baseline)

        results = self.acknowledge(judging, judging(gates))
        self.document["confirmation"] = {
            "artifact": chosen,
            "among": list(leaves),
            "measurement": evaluation.measurement,
            "gates": [result.to_json() for result in results],
        }
        if "latency" in evaluation.sidecars:
            self.sidecars["latency.confirmation"] = evaluation.sidecars["latency"]
        return results

    def _evaluate(self, subjects: Mapping[str, Subject], **how: Any) -> Evaluation:
        from optimize.evaluate import evaluate

        return evaluate(
            {name: subject.artifact for name, subject in subjects.items()},
            task=tasks.get(self.recipe.model.task),
            data=self.data,
            work=self.work,
            progress=self.progress,
            remeasure=self.remeasure,
            **how,
        )


def _judges(gate: Gate, leaf: str, baseline: str) -> bool:
    """As `judge` has it: without `on`, every leaf but the one that it is compared with."""
    if gate.on is None:
        return gate.limit[0] not in RELATIVE or leaf != (gate.over or baseline)
    return leaf == gate.on if isinstance(gate.on, str) else leaf in gate.on


def gated_pairs(gates: Sequence[Gate], leaves: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """(judged, compared with), for every gate."""
    pairs = []
    for gate in gates:
        judged = leaves if gate.on is None else [gate.on] if isinstance(gate.on, str) else list(gate.on)
        pairs += [(name, gate.over or baseline) for name in judged]
    return list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def describe_artifacts(subjects: Mapping[str, Subject], source: Artifact) -> list[dict[str, Any]]:
    """`artifacts` of run.json, without scores yet. Bits per weight are over the parameters of `source`."""
    parameters = runtimes.get(source.format).parameters(source.path)
    digests = {SOURCE: source.digest, **{name: subject.artifact.digest for name, subject in subjects.items()}}
    return [
        {
            "digest": digests[name],
            "key": subject.key,
            "name": name,
            "stage": subject.stage,
            "parent": digests.get(subject.parent or ""),
            "format": subject.artifact.format,
            "path": str(subject.artifact.path),
            "cached": subject.cached,
            "seconds": round(subject.seconds, 3),
            "size_bytes": subject.artifact.size_bytes,
            "bits_per_weight": round(8 * subject.artifact.size_bytes / parameters, 3),
            "scores": {},
        }
        for name, subject in subjects.items()
    ]


def describe_data(data: Data) -> dict[str, Any]:
    """`data` of run.json."""
    return {split: {"digest": digest, "rows": data.num_rows[split]} for split, digest in data.digests.items()}


def _describe_comparisons(
    evaluation: Evaluation, subjects: Mapping[str, Subject], baseline: str, results: Sequence[GateResult]
) -> list[dict[str, Any]]:
    """Everything over the baseline, then over what it was made from, then the pairs that only gates asked for."""
    wanted = [(name, baseline, metric) for name in subjects for metric in evaluation.metrics]
    parents = [(name, one.parent) for name, one in subjects.items() if one.parent in subjects]
    wanted += [(name, parent, metric) for name, parent in parents if parent for metric in evaluation.metrics]
    wanted += [(result.artifact, result.over, result.metric) for result in results if result.over]
    return [
        comparison.to_json()
        for name, over, metric in dict.fromkeys(wanted)
        if name != over
        for comparison in evaluation.compare(name, over, metric)
    ]
