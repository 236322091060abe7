"""Timings that are kept: found again for the same artifacts, rows, settings and host, or measured and stored."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact, digest_of
from optimize.atomic import write_bytes
from optimize.evaluate import host
from optimize.evaluate.outputs import SPLIT, Outputs
from optimize.evaluate.scores import Scores

if TYPE_CHECKING:
    from optimize.evaluate.timings import Setting, Timings
    from optimize.progress import Progress
    from optimize.recipe import Evaluate
    from optimize.tasks import Task

MEMORY_ROUNDS = 3
"""Fresh processes an artifact, where memory is measured without latency."""
LOCK = "optimize-measuring.lock"
"""In the temporary folder, which all on a machine share and other machines do not."""


@dataclass(frozen=True)
class Measured:
    """Stored timings. What is shown of them is kept as well, so that reuse computes nothing."""

    path: Path
    scores: Scores

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def timings(self) -> Timings:
        from optimize.evaluate.timings import Timings

        return Timings.from_json(json.loads(self.path.read_bytes()))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """{"measurement": as in run.json, "latency": {slot: scores}, "peaks": {slot: bytes}}"""

        def summarise() -> dict[str, Any]:
            timings = self.timings
            return {
                "measurement": timings.measurement(),
                "latency": {
                    slot: [timings.describe(slot, setting) for setting in timings.settings]
                    for slot in timings.slots
                    if timings.timed
                },
                "peaks": {
                    slot: round(statistics.median(one.peaks[slot] for one in timings.kept)) for slot in timings.slots
                },
            }

        return self.scores.value("summaries", {"timings": self.digest}, summarise)  # type: ignore[no-any-return]


def slots_of(subjects: Mapping[str, Artifact]) -> dict[str, str]:
    """Name -> slot: the digest and, since the same artifact may stand under two names, a number."""
    seen: list[str] = []
    slots = {}
    for name, artifact in subjects.items():
        slots[name] = f"{artifact.digest}#{seen.count(artifact.digest)}"
        seen.append(artifact.digest)
    return slots


def measure_processes(
    subjects: Mapping[str, Artifact],
    *,
    baseline: str,
    pairs: Sequence[tuple[str, str]],
    settings: Evaluate,
    outputs: Outputs,
    scores: Scores,
    progress: Progress,
    remeasure: bool,
    again: bool,
) -> Measured:
    """Timings of at least these artifacts. With `remeasure`, more rounds are added to those that are there.

    With `again`, they are apart from those that were taken without it.
    """
    slots = slots_of(subjects)
    # A measurement of more artifacts serves for fewer, unless the baseline, and with it the control, is another.
    folder = _folder(settings, outputs, scores, slots[baseline], again)
    stored = _stored(folder, scores, slots)
    if stored is not None and not remeasure:
        return stored
    on_wait = "another measurement is running on this machine, and this one waits for its end"
    with _alone(lambda: progress.update("scores", 0, 0, on_wait)):
        # Whoever measured while we waited may have measured this.
        stored = _stored(folder, scores, slots)
        if stored is not None and not remeasure:
            return stored
        timings = _measure(subjects, slots, baseline, pairs, settings, outputs, stored, progress)
        path = folder / f"{digest_of(sorted(timings.slots)).removeprefix('sha256:')[:40]}.json"
        write_bytes(path, json.dumps(timings.to_json(), allow_nan=False).encode())
    scores.computed.append("timings")
    return Measured(path, scores)


def _measure(
    subjects: Mapping[str, Artifact],
    slots: Mapping[str, str],
    baseline: str,
    pairs: Sequence[tuple[str, str]],
    settings: Evaluate,
    outputs: Outputs,
    stored: Measured | None,
    progress: Progress,
) -> Timings:
    from optimize.evaluate.latency import Plan, measure
    from optimize.evaluate.timings import Timings

    measured_at = _settings(settings, outputs.task, subjects[baseline])
    latency = settings.latency
    timings = (
        stored.timings.only(list(slots.values()))
        if stored
        else Timings(
            slots=list(slots.values()),
            baseline=slots[baseline],
            settings=measured_at,
            fewest=latency.rounds if latency else MEMORY_ROUNDS,
            timed=latency is not None,
        )
    )
    with _inputs(subjects, measured_at, outputs) as (scratch, inputs):
        plan = Plan(
            artifacts={slots[name]: (name, artifact) for name, artifact in subjects.items()},
            inputs={slots[name]: paths for name, paths in inputs.items()},
            pairs=[(slots[name], slots[over]) for name, over in pairs],
            half_width=latency.half_width if latency else 1.0,
            budget_seconds=latency.budget_seconds if latency else 1.0,
            folder=scratch,
            on_round=lambda done, total, left: progress.update(
                "scores", done, total, f"round {done} of {total}, about {left:.0f} s left"
            ),
        )
        measure(timings, plan)
    return timings


@contextlib.contextmanager
def _alone(on_wait: Callable[[], None]) -> Iterator[None]:
    """While this lasts nobody else on this machine measures: two at once would disturb each other.

    As far as a lock can be had; without one the machine's signals still tell of a disturbance.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(Path(tempfile.gettempdir()) / LOCK, mode=0o666, thread_local=False)
    with contextlib.suppress(OSError, NotImplementedError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _folder(settings: Evaluate, outputs: Outputs, scores: Scores, baseline: str, again: bool) -> Path:
    """Where timings lie that may serve for each other."""
    key = {
        "baseline": baseline,
        "again": again,
        "rows": outputs.data.digests[SPLIT],
        "task": [outputs.task.name, outputs.task.VERSION],
        "settings": settings.latency.of(outputs.task) if settings.latency else settings.batch_size,
        # What the system keeps of the memory for itself differs by some pages from one start to the next.
        "host": {name: fact for name, fact in host.fingerprint().items() if name != "memory_bytes"},
    }
    return scores.path("timings", key, suffix="")


def _stored(folder: Path, scores: Scores, slots: Mapping[str, str]) -> Measured | None:
    """What was measured of just these, else of these and others (the most rounds), else None.

    In that order, so that measuring more artifacts changes no verdict that stands.
    """
    wanted = {*slots.values()}
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        # A file that can't be read is measured again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            one = Measured(path, scores)
            if wanted <= {*one.timings.slots}:
                found.append(one)
    return max(found, key=lambda one: (len(one.timings.slots) == len(wanted), len(one.timings.kept)), default=None)


def _settings(settings: Evaluate, task: Task, baseline: Artifact) -> list[Setting]:
    """What is called: to be timed, or, without `latency`, for the memory that it takes."""
    from optimize.evaluate.timings import Batch, Decode, Images, Prefill
    from optimize.recipe.latency import Latency

    latency = settings.latency or Latency()
    threads = min(latency.threads, host.cpu_count())
    if task.generates:
        prefill = [Prefill(length, threads) for length in dict.fromkeys(latency.prefill)]
        decode = latency.decode
        return [*prefill, *([Decode(decode.prompt_length, decode.new_tokens, threads)] if decode else [])]
    if not task.has_length:
        sizes = latency.batch_sizes if settings.latency else (settings.batch_size,)
        return [Images(size, threads) for size in dict.fromkeys(sizes)]
    if settings.latency is None:
        return [Batch(settings.batch_size, int(baseline.task.get("max_length", 128)), threads)]
    return [Batch(size, latency.sequence_length, threads) for size in dict.fromkeys(latency.batch_sizes)]


@contextlib.contextmanager
def _inputs(
    subjects: Mapping[str, Artifact], settings: Sequence[Setting], outputs: Outputs
) -> Iterator[tuple[Path, dict[str, list[Path]]]]:
    """A folder for the time of measuring, and in it each artifact's inputs, a file for each setting."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="optimize-") as name:
        folder = Path(name)
        files: dict[str, list[Path]] = {}
        for number, (subject, artifact) in enumerate(subjects.items()):
            files[subject] = []
            for index, setting in enumerate(settings):
                path = folder / f"{number}-{index}.npz"
                rows, tokens = setting.shape
                inputs = outputs.inputs(subject, artifact, batch_size=rows, sequence_length=tokens)
                np.savez(path, allow_pickle=False, **inputs)
                files[subject].append(path)
        yield folder, files
