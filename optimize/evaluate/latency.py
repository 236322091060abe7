"""Latency and peak memory by rounds of fresh processes that take turns.

Process start shifts a model's speed by a percent or two for good (where its memory lies), so a process is the unit:
each round starts one for every artifact and one more for the baseline, the A/A control. All have the same threads,
processors and denormal mode. They warm up until they get no faster; then they take turns, in random order, in short
blocks of calls, and whoever waits is stopped, so that no thread pool spins. What a call is, `timings.Setting` says.

Rounds go on to a half-width set beforehand or to the budget; a gate's limit has no say.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.evaluate import process, signals
from optimize.evaluate.process import Worker, workers
from optimize.evaluate.timings import CONTROL, Decode, Round, Timings
from optimize.evaluate.types import CONFIDENCE

if TYPE_CHECKING:
    from optimize.artifact import Artifact

BLOCK_SECONDS = 0.015
"""A block is so long, or one call."""
FEWEST_TURNS, MOST_TURNS = 2, 16
"""Turns in a round at one setting, an even number; between them the budget decides."""
LEAST_SECONDS = 1.0
"""For turns at one setting, however little of the budget starting the processes has left."""
WARM_SECONDS = 3.0
"""Warming up one artifact at one setting ends with the call that takes it past this."""
BUDGET_SHARE = 2 / 3
"""Of the budget, what the fewest rounds are laid out to take; the rest is for rounds that replace dropped ones."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    artifacts: Mapping[str, tuple[str, Artifact]]
    """Slot -> (the name that errors use, artifact), the control left out."""
    inputs: Mapping[str, Sequence[Path]]
    """Slot -> one `.npz` for each setting."""
    pairs: Sequence[tuple[str, str]]
    """Slots (candidate, over) whose log ratio is wanted to the half-width."""
    half_width: float
    budget_seconds: float
    folder: Path
    """For the workers' error output, and where they run."""
    on_round: Callable[[int, int, float], None]
    """Told (rounds done, rounds in all, seconds left) after each."""


def measure(timings: Timings, plan: Plan) -> None:
    """Add rounds: at least `timings.fewest`, more until every pair is narrow enough, as far as the budget allows.

    To timings that have rounds already, exactly so many are added. Raises `EvaluationError` where an artifact's process
    crashes, hangs or can't answer; no process is left behind in any case.
    """
    began = time.monotonic()
    more = timings.timed and not timings.rounds
    wanted, done, dropped = timings.fewest, 0, 0
    timings.attempts += 1
    while done < wanted:
        one = _round(timings, plan, time.monotonic() + BUDGET_SHARE * plan.budget_seconds / timings.fewest)
        elapsed = time.monotonic() - began
        each = elapsed / (done + dropped + 1)
        # Decided on the machine's signals and the clock, never on times of calls; a machine may never be quiet.
        may_drop = dropped < timings.fewest // 2 and elapsed + (wanted - done) * each <= plan.budget_seconds
        keep = not (one.disturbed and may_drop)
        timings.rounds.append(replace(one, kept=keep))
        done, dropped = (done + 1, dropped) if keep else (done, dropped + 1)
        if more and keep and done >= timings.fewest:
            affordable = done + int((plan.budget_seconds - elapsed) / each)
            wanted = min(_rounds_for(timings, plan), affordable)
        plan.on_round(done, max(wanted, done), max(wanted - done, 0) * each)


def _rounds_for(timings: Timings, plan: Plan) -> int:
    """About how many rounds bring every pair to the half-width; no more than there are where they have."""
    halves = []
    for setting in timings.settings:
        for candidate, over in plan.pairs:
            low, high = timings.interval(timings.log_ratios(candidate, over, setting.label), CONFIDENCE)
            halves.append((high - low) / 2)
    return math.ceil(len(timings.kept) * (max(halves, default=0.0) / plan.half_width) ** 2)


def _round(timings: Timings, plan: Plan, deadline: float) -> Round:
    number = len(timings.rounds)
    threads = timings.settings[0].threads
    cores = signals.quietest_cores(threads)
    slots = [*timings.slots, *([CONTROL] if timings.timed else [])]
    # Each is the first to start as often as any other.
    slots = slots[number % len(slots) :] + slots[: number % len(slots)]
    sources = [timings.baseline if slot == CONTROL else slot for slot in slots]
    with workers([plan.artifacts[source] for source in sources], threads, plan.folder) as started:
        by_slot = dict(zip(slots, started, strict=True))
        for worker, source in zip(started, sources, strict=True):
            worker.send_open(plan.inputs[source], timings.settings)
        denormals = [worker.reply()["denormals"] for worker in started]
        for worker in started:
            if cores:
                worker.ask("pin", cores=list(cores))
            worker.stop()
        speeds = _warm_up(timings, by_slot)
        peaks = {slot: _on_turn(worker, "peak")["bytes"] for slot, worker in by_slot.items()}
        if not timings.timed:
            return Round({}, peaks, {}, [], cores, all(denormals))
        if not timings.turns:
            _lay_out(timings, speeds, deadline - time.monotonic())
        usage = signals.Usage()
        before = signals.read()
        seconds = {
            setting.label: _take_turns(timings, by_slot, index, speeds[setting.label], usage)
            for index, setting in enumerate(timings.settings)
        }
        found = signals.signals(before, signals.read(), usage, cores)
    return Round(seconds, peaks, found, signals.disturbances(found), cores, all(denormals))


def _on_turn(worker: Worker, do: str, **request: Any) -> dict[str, Any]:
    """Let one stopped worker go on for one question."""
    worker.go_on()
    answer = worker.ask(do, **request)
    worker.stop()
    return answer


def _warm_up(timings: Timings, by_slot: Mapping[str, Worker]) -> dict[str, dict[str, float]]:
    """Setting -> slot -> seconds a call once warm (memory alone needs a single answer)."""
    speeds: dict[str, dict[str, float]] = {}
    for index, setting in enumerate(timings.settings):
        speeds[setting.label] = {}
        for slot, worker in by_slot.items():
            if timings.timed:
                speeds[setting.label][slot] = _on_turn(worker, "warm", input=index, seconds=WARM_SECONDS)[
                    "call_seconds"
                ]
            else:
                _on_turn(worker, "run", input=index, calls=1, lead_in=False)
    return speeds


def _lay_out(timings: Timings, speeds: Mapping[str, Mapping[str, float]], seconds: float) -> None:
    """Set the calls of a block and the turns of a round, once for all: what is cheap leaves time to what is not."""
    costs: dict[str, float] = {}
    for setting in timings.settings:
        label, by_slot = setting.label, speeds[setting.label]
        timings.calls[label] = {slot: max(1, round(BLOCK_SECONDS / call)) for slot, call in by_slot.items()}
        if isinstance(setting, Decode):
            # A call is the slower the longer the text before it: all go through it in step.
            timings.calls[label] = dict.fromkeys(by_slot, max(timings.calls[label].values()))
        extra = _leads_in(timings, label)
        costs[label] = sum(call * (timings.calls[label][slot] + extra) for slot, call in by_slot.items())
    for done, label in enumerate(sorted(costs, key=lambda label: costs[label])):
        share = max(LEAST_SECONDS, seconds / (len(costs) - done))
        timings.turns[label] = max(FEWEST_TURNS, min(MOST_TURNS, 2 * int(share / costs[label] / 2)))
        seconds -= timings.turns[label] * costs[label]


def _take_turns(
    timings: Timings,
    by_slot: Mapping[str, Worker],
    index: int,
    speeds: Mapping[str, float],
    usage: signals.Usage,
) -> dict[str, list[list[float]]]:
    """Slot -> turns -> seconds of each call, at one setting."""
    label = timings.settings[index].label
    chance = random.Random(f"{len(timings.rounds)} {label}")
    lead_in = _leads_in(timings, label)
    seconds: dict[str, list[list[float]]] = {slot: [] for slot in by_slot}
    order = list(by_slot)
    for turn in range(timings.turns[label]):
        # Random, and every other turn backwards, so that each goes before each as often as after it.
        chance.shuffle(order) if turn % 2 == 0 else order.reverse()
        for slot in order:
            calls = timings.calls[label][slot]
            # A block of decoding may have to read its prompt before.
            patience = process.PATIENCE_SECONDS + 30 * (calls + 1) * speeds[slot]
            request = {"input": index, "calls": calls, "lead_in": lead_in, "patience": patience}
            answer = _on_turn(by_slot[slot], "run", **request)
            seconds[slot].append([float(f"{call:.6g}") for call in answer["seconds"]])
            usage.add(answer["cpu"], answer["waited"], answer["switches"])
    return seconds


def _leads_in(timings: Timings, label: str) -> bool:
    """Whether blocks begin with an untimed call, those of all or of none: the first call after a wait is slower."""
    return any(calls > 1 for calls in timings.calls[label].values())
