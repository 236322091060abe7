"""The scores of several artifacts and every comparison between them."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact, sha256_file
from optimize.atomic import write_bytes
from optimize.errors import EvaluationError
from optimize.evaluate import host
from optimize.evaluate.measured import Measured, measure_processes, slots_of
from optimize.evaluate.outputs import Outputs
from optimize.evaluate.scores import Scores
from optimize.evaluate.types import CONFIDENCE, TIMES, Comparison, Unit, times_of, to_plain
from optimize.prune import masks

if TYPE_CHECKING:
    from optimize.data import Data
    from optimize.evaluate.answers import Estimate
    from optimize.evaluate.timings import Timings
    from optimize.progress import Progress
    from optimize.recipe import Evaluate
    from optimize.tasks import Metric, Task
    from optimize.work import Work


@dataclass(frozen=True)
class Measure:
    """A metric that every task has."""

    name: str
    higher_is_better: bool = False


class Evaluation:
    """What was measured of `subjects`; comparisons are worked out when asked for.

    scores: name -> `scores` of an artifact in run.json. metrics: name -> what says `higher_is_better`, for all that was
    measured. measurement: as in run.json. sidecars: name -> file with bulky data. reused: nothing had to be measured.
    """

    def __init__(
        self,
        subjects: Mapping[str, Artifact],
        *,
        parents: Mapping[str, str],
        baseline: str,
        task: Task,
        data: Data,
        settings: Evaluate,
        work: Work,
        progress: Progress,
        pairs: Sequence[tuple[str, str]],
        again: bool,
    ) -> None:
        self.subjects = dict(subjects)
        self.parents = dict(parents)
        self.baseline = baseline
        self.settings = settings
        self.progress = progress
        self.scores: dict[str, dict[str, Any]] = {name: {} for name in subjects}
        self.measurement: dict[str, Any] = {}
        self.sidecars: dict[str, Path] = {}
        self.reused = False
        self._store = Scores(work.scores)
        self._outputs = Outputs(
            task,
            data,
            self._store,
            batch_size=settings.batch_size,
            threads=min(settings.threads or host.cpu_count(), host.cpu_count()),
            on_batch=lambda name, done, total: progress.update("scores", done, total, f"answers of {name}"),
        )
        self._metrics: dict[str, Metric] = task_metrics(task, settings.metrics)
        self._sources = {
            name: _source(metric.compute) for name, metric in self._metrics.items() if name not in task.metrics
        }
        self._slots = slots_of(self.subjects)
        self._pairs = [(name, baseline) for name in subjects if name != baseline] + list(pairs)
        self._again = again
        self._measured: Measured | None = None

    @property
    def metrics(self) -> dict[str, Metric | Measure]:
        times = times_of(self._outputs.task) if self.settings.latency else ()
        memory = ["peak_memory"] if self.settings.peak_memory else []
        return {**self._metrics, **{name: Measure(name) for name in ("size", *times, *memory)}}

    def measure(self, *, remeasure: bool) -> None:
        """Fill `scores`, `measurement` and `sidecars`."""
        for name, artifact in self.subjects.items():
            for metric in self._metrics:
                (found,) = self.absolute(name, metric)
                self.scores[name][metric] = to_plain({"value": found.estimate, "ci": found.ci, "n": found.n})
            if self.settings.fidelity:
                self.scores[name]["fidelity"] = self._fidelity(name)
            if masks.FILE in artifact.files:
                self.scores[name]["sparsity"] = self._sparsity(artifact)
            if self.settings.flips and name != self.baseline and (flips := self._flips(name, artifact)):
                self.sidecars[f"flips.{name}"] = flips
        if self.settings.latency or self.settings.peak_memory:
            self._measured = measured = measure_processes(
                self.subjects,
                baseline=self.baseline,
                pairs=self._pairs,
                settings=self.settings,
                outputs=self._outputs,
                scores=self._store,
                progress=self.progress,
                remeasure=remeasure,
                again=self._again,
            )
            self.measurement = measured.summary["measurement"]
            self.sidecars["latency"] = measured.path
            for name, slot in self._slots.items():
                if self.settings.peak_memory:
                    self.scores[name]["peak_memory_bytes"] = measured.summary["peaks"][slot]
                if self.settings.latency:
                    self.scores[name]["latency"] = measured.summary["latency"][slot]
        for name, over in self._pairs:
            for metric in self.metrics:
                self.compare(name, over, metric)
        self.reused = not self._store.computed

    def compare(self, candidate: str, over: str, metric: str, confidence: float = CONFIDENCE) -> list[Comparison]:
        """One artifact against another, at each setting. Raises `EvaluationError` for what was not measured."""
        ours, theirs = self.subjects[candidate], self.subjects[over]
        if metric in self._metrics:
            key = {"over": theirs.digest, **self._metric_key(metric, candidate, confidence)}

            def work_out() -> dict[str, Any]:
                from optimize.evaluate.answers import compare_answers

                answers = self._outputs.pair(candidate, ours, over, theirs)
                return _plain(compare_answers(self._metrics[metric], *answers, self._outputs.targets, confidence))

            found = self._store.value("comparisons", key, work_out)
            return [_comparison(candidate, over, metric, None, "difference", confidence, found)]
        if metric == "size":
            return [_exact(candidate, over, metric, "ratio", confidence, ours.size_bytes / theirs.size_bytes)]
        slots = self._slots[candidate], self._slots[over]
        return self._process_comparisons(candidate, over, metric, slots, confidence)

    def absolute(self, name: str, metric: str, confidence: float = CONFIDENCE) -> list[Comparison]:
        """An artifact's own value at each setting: times in milliseconds, size and memory in bytes."""
        artifact = self.subjects[name]
        if metric in self._metrics:

            def work_out() -> dict[str, Any]:
                from optimize.evaluate.answers import score_answers

                answers = self._outputs.of(name, artifact)
                return _plain(score_answers(self._metrics[metric], answers, self._outputs.targets, confidence))

            found = self._store.value("values", self._metric_key(metric, name, confidence), work_out)
            return [_comparison(name, None, metric, None, "absolute", confidence, found)]
        if metric == "size":
            return [_exact(name, None, metric, "absolute", confidence, float(artifact.size_bytes))]
        return self._process_comparisons(name, None, metric, (self._slots[name],), confidence)

    # Answers

    def _metric_key(self, metric: str, name: str, confidence: float) -> dict[str, Any]:
        return {
            "metric": metric,
            "source": self._sources.get(metric),
            "confidence": confidence,
            **self._outputs.key(self.subjects[name]),
        }

    def _fidelity(self, name: str) -> dict[str, Any]:
        """To the parent and to the baseline, where they are among the subjects and not the artifact itself."""
        found = {}
        for role, other in (("parent", self.parents.get(name)), ("baseline", self.baseline)):
            if other is None or other == name or other not in self.subjects:
                continue
            artifact, reference = self.subjects[name], self.subjects[other]

            def work_out(other: str = other, artifact: Artifact = artifact, reference: Artifact = reference) -> Any:
                return self._outputs.task.fidelity(*self._outputs.pair(name, artifact, other, reference))

            key = {"reference": reference.digest, "spread": "p999", **self._outputs.key(artifact)}
            found[role] = self._store.value("fidelity", key, work_out)
        return found

    def _sparsity(self, artifact: Artifact) -> float | None:
        return self._store.value("sparsity", {"artifact": artifact.digest}, lambda: masks.sparsity(artifact))  # type: ignore[no-any-return]

    def _flips(self, name: str, artifact: Artifact) -> Path | None:
        """A JSON line for each answer that is not the baseline's; None where the task can't tell."""
        reference = self.subjects[self.baseline]
        path = self._store.path("flips", {"over": reference.digest, **self._outputs.key(artifact)}, ".jsonl")
        if not path.exists():
            ours, theirs = self._outputs.pair(name, artifact, self.baseline, reference)
            task, preprocessor = self._outputs.task, self._outputs.preprocessor(artifact)
            flips = task.flips(preprocessor, self._outputs.rows, ours, theirs, reference.task)
            if flips is None:
                return None
            lines = [json.dumps(flip, ensure_ascii=False) for flip in flips]
            write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
        return path

    # Processes

    def _process_comparisons(
        self, name: str, over: str | None, metric: str, slots: tuple[str, ...], confidence: float
    ) -> list[Comparison]:
        if self._measured is None or metric not in self.metrics:
            raise EvaluationError(f"{metric} was not measured", stage=name)
        measured = self._measured

        def work_out() -> dict[str, Any]:
            """Setting -> {"estimate", "ci", "n"}"""
            timings = measured.timings
            if metric == "peak_memory":
                logs = [timings.log_peaks(slot) for slot in slots]
                ratios = logs[0] if over is None else [a - b for a, b in zip(*logs, strict=True)]
                return {"": _geometric(timings, ratios, confidence)}
            return {
                setting.label: _geometric(
                    timings,
                    [value + math.log(1e3) for value in timings.log_seconds(slots[0], setting.label)]
                    if over is None
                    else timings.log_ratios(slots[1], slots[0], setting.label),
                    confidence,
                )
                for setting in timings.settings
                if setting.metric == metric
            }

        unit: Unit = "absolute" if over is None else "speedup" if metric in TIMES else "ratio"
        key = {"timings": measured.digest, "metric": metric, "slots": list(slots), "confidence": confidence}
        found = self._store.value("comparisons", key, work_out)
        return [
            _comparison(name, over, metric, label or None, unit, confidence, value) for label, value in found.items()
        ]


def task_metrics(task: Task, names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of these names, or the task's default. Raises `RecipeError` for one that can't be imported."""
    from optimize.evaluate.metrics import load_metric

    return {name: task.metrics.get(name) or load_metric(name) for name in names or task.default_metrics}


def _source(function: Any) -> str | None:
    """The hash of the file with the user's own function, which may change between two runs; None for built-ins."""
    try:
        return sha256_file(Path(inspect.getfile(function if inspect.isfunction(function) else type(function))))
    except (TypeError, OSError):
        return None


def _plain(found: Estimate) -> dict[str, Any]:
    return {"estimate": found.estimate, "ci": list(found.ci), "n": found.n, "details": dict(found.details)}


def _geometric(timings: Timings, log_values: Sequence[float], confidence: float) -> dict[str, Any]:
    """The geometric mean over rounds with its interval."""
    low, high = timings.interval(log_values, confidence)
    return {
        "estimate": math.exp(statistics.fmean(log_values)),
        "ci": [math.exp(low), math.exp(high)],
        "n": len(log_values),
    }


def _comparison(
    name: str,
    over: str | None,
    metric: str,
    setting: str | None,
    unit: Unit,
    confidence: float,
    found: Mapping[str, Any],
) -> Comparison:
    return Comparison(
        artifact=name,
        over=over,
        metric=metric,
        setting=setting,
        estimate=found["estimate"],
        unit=unit,
        ci=(found["ci"][0], found["ci"][1]),
        n=found["n"],
        confidence=confidence,
        details=found.get("details", {}),
    )


def _exact(name: str, over: str | None, metric: str, unit: Unit, confidence: float, value: float) -> Comparison:
    return _comparison(name, over, metric, None, unit, confidence, {"estimate": value, "ci": (value, value), "n": 1})
