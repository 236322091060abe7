from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from optimize.artifact import Artifact
from optimize.errors import EvaluationError
from optimize.evaluate import latency, process
from optimize.evaluate.latency import Plan, measure
from optimize.evaluate.process import Worker, workers
from optimize.evaluate.timings import CONTROL, Batch, Round, Timings
from optimize.evaluate.worker import Served

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")

SETTINGS = [Batch(1, 8, 1), Batch(4, 8, 1)]
LABELS = [setting.label for setting in SETTINGS]


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def plan_of(artifacts: Mapping[str, Artifact], folder: Path, **changes: Any) -> Plan:
    paths = []
    for setting in SETTINGS:
        paths.append(folder / f"{setting.batch_size}.npz")
        np.savez(paths[-1], input_ids=np.ones((setting.batch_size, setting.sequence_length), dtype=np.int64))
    names = list(artifacts)
    plan = Plan(
        artifacts={name: (name, artifact) for name, artifact in artifacts.items()},
        inputs=dict.fromkeys(names, paths),
        pairs=[(name, names[0]) for name in names[1:]],
        half_width=10.0,
        budget_seconds=5.0,
        folder=folder,
        on_round=lambda done, total, left: None,
    )
    return replace(plan, **changes)


def timings_of(plan: Plan, fewest: int = 2, **changes: Any) -> Timings:
    slots = list(plan.artifacts)
    return Timings(slots, slots[0], SETTINGS, fewest=fewest, **changes)


@pytest.mark.usefixtures("runtimes_installed")
def test_a_runtime_that_sleeps_is_found_slower(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    plan = plan_of({"plain": toy("a"), "slow": toy("b", format="onnx-twice")}, tmp_path)
    timings = timings_of(plan)
    with nothing_left_behind():
        measure(timings, plan)
    assert len(timings.kept) == 2
    assert timings.attempts == 1
    for label in LABELS:
        assert min(timings.log_ratios("slow", "plain", label)) > np.log(1.5)
        assert max(map(abs, timings.log_ratios(CONTROL, "plain", label))) < np.log(1.5)
    for one in timings.rounds:
        assert one.denormals
        assert set(one.seconds) == set(LABELS)
        assert set(one.peaks) == {"plain", "slow", CONTROL} == set(one.seconds[LABELS[0]])
        assert len(one.cores) == 1
        # The plan is made once, so that every round weighs the same.
        for label in LABELS:
            assert {len(turns) for turns in one.seconds[label].values()} == {timings.turns[label]}


@pytest.mark.usefixtures("runtimes_installed")
def test_a_library_that_prints_does_not_break_the_protocol(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    plan = plan_of({"chatty": toy("a", format="onnx-chatty")}, tmp_path)
    timings = timings_of(plan, fewest=1)
    measure(timings, plan)
    assert timings.samples("chatty", LABELS[0])


@pytest.mark.usefixtures("runtimes_installed")
def test_a_hung_model_is_an_error_that_names_it(
    toy: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of({"plain": toy("a"), "stuck": toy("b", format="onnx-hangs")}, tmp_path)
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 4.0)
    with nothing_left_behind(), pytest.raises(EvaluationError, match=r"stuck.*did not answer within 4 s"):
        measure(timings_of(plan), plan)


@pytest.mark.usefixtures("runtimes_installed")
def test_a_crash_is_an_error_with_what_was_said_last(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    plan = plan_of({"plain": toy("a"), "broken": toy("b", format="onnx-crashes")}, tmp_path)
    with nothing_left_behind(), pytest.raises(EvaluationError, match="killed by SIGSEGV") as raised:
        measure(timings_of(plan), plan)
    assert "the model is about to crash" in str(raised.value)
    assert raised.value.stage == "broken"


def test_a_damaged_model_is_an_error_that_names_it(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    damaged = toy("b")
    (damaged.path / "model.onnx").write_bytes(b"\x08\x01 nothing of a model")
    plan = plan_of({"plain": toy("a"), "damaged": damaged}, tmp_path)
    with nothing_left_behind(), pytest.raises(EvaluationError) as raised:
        measure(timings_of(plan), plan)
    assert raised.value.stage == "damaged"


# One worker


def test_workers_have_the_same_threads_and_processors(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    with workers([("a", toy("a"))], 1, tmp_path) as (worker,):
        worker.send_open(plan_of({"a": toy("c")}, tmp_path).inputs["a"], SETTINGS)
        assert worker.reply() == {"denormals": True}
        worker.ask("pin", cores=[core])
        threads = [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{worker.pid}/task").iterdir()]
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().decode().split("\0")
    assert threads
    assert all(thread == {core} for thread in threads)
    assert {"OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1"} <= set(environment)


def test_usage_counts_the_lead_in() -> None:
    """Else our own work on the processors that measure would pass for somebody else's, and drop every round."""

    def burn(inputs: Any) -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    served = object.__new__(Served)
    served.runner = SimpleNamespace(run=burn)
    served.calls = [partial(served.answer, {})]
    told = served.run(0, calls=2, lead_in=True)
    assert len(told["seconds"]) == 2
    assert told["cpu"] >= 0.06


def test_an_answer_cut_short_is_a_death(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    with workers([("a", toy("a"))], 1, tmp_path) as (worker,):
        worker._lines.put(b'{"seco')
        worker._process.kill()
        with pytest.raises(EvaluationError, match="SIGKILL"):
            worker.reply()


def test_who_waits_is_stopped(toy: Callable[..., Artifact], tmp_path: Path) -> None:
    with workers([("a", toy("a"))], 1, tmp_path) as (worker,):
        peak = worker.ask("peak")["bytes"]
        worker.stop()
        assert _becomes(worker, psutil.STATUS_STOPPED)
        worker.go_on()
        assert worker.ask("peak")["bytes"] >= peak
        worker.stop()
    assert not psutil.pid_exists(worker.pid)


def _becomes(worker: Worker, status: str) -> bool:
    end = time.monotonic() + 5
    while psutil.Process(worker.pid).status() != status:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_the_worker_imports_little() -> None:
    code = (
        "import sys, optimize.evaluate.worker; from optimize import runtimes; runtimes.get('onnx');"
        "print([n for n in ('torch', 'pyarrow', 'scipy', 'pydantic', 'transformers') if n in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


MEASURES_FOR_EVER = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
sys.path.insert(0, {tests!r})
from conftest import _build
from test_latency import measure, plan_of, timings_of
folder = Path({folder!r})
artifacts = {{name: _build(folder / name, seed=0, width=16, layers=1, format="onnx") for name in "ab"}}
plan = plan_of(artifacts, folder, half_width=1e-9, budget_seconds=600.0, on_round=lambda *_: print("round", flush=True))
measure(timings_of(plan), plan)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_whoever_ends_us(end: signal.Signals, tmp_path: Path) -> None:
    if end != signal.SIGINT and sys.platform != "linux":
        pytest.skip("only Linux ends children with their parent")
    code = MEASURES_FOR_EVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    measuring = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert measuring.stdout is not None
    with measuring.stdout:
        assert measuring.stdout.readline() == b"round\n"
        started = _children_at_work(measuring.pid)
        measuring.send_signal(end)
        measuring.wait(30)
    assert measuring.returncode != 0
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def _children_at_work(pid: int) -> list[psutil.Process]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        children = psutil.Process(pid).children()
        if len(children) == 3 and any(child.status() == psutil.STATUS_STOPPED for child in children):
            return children
        time.sleep(0.005)
    raise AssertionError("no round began")


# How many rounds


def fake_rounds(monkeypatch: pytest.MonkeyPatch, *, disturbed: Callable[[int], bool], spread: float = 0.0) -> list[int]:
    """Instead of measuring, rounds whose candidate is `spread` faster and slower in turn; told is each one's number."""
    made: list[int] = []

    def one(timings: Timings, plan: Plan, deadline: float) -> Round:
        number = len(timings.rounds)
        made.append(number)
        slowed = float(np.exp(spread * (-1) ** number))
        seconds = {label: {"a": [[1.0]], "b": [[slowed]], CONTROL: [[1.0]]} for label in LABELS}
        peaks = {"a": 1, "b": 1, CONTROL: 1}
        return Round(seconds, peaks, {}, ["waited"] if disturbed(number) else [], (0,), True)

    monkeypatch.setattr(latency, "_round", one)
    return made


def fake_plan(tmp_path: Path, **changes: Any) -> tuple[Plan, Timings]:
    artifact = Artifact(tmp_path, "onnx", {}, {})
    plan = plan_of({"a": artifact, "b": artifact}, tmp_path, **changes)
    return plan, timings_of(plan, fewest=6)


def test_disturbed_rounds_are_dropped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rounds(monkeypatch, disturbed=lambda number: number in (1, 4))
    plan, timings = fake_plan(tmp_path)
    measure(timings, plan)
    assert [one.kept for one in timings.rounds] == [True, False, True, True, False, True, True, True]
    assert not timings.measurement()["noisy"]


def test_no_round_is_dropped_that_the_budget_could_not_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_rounds(monkeypatch, disturbed=lambda number: True)
    clock = iter(np.arange(0, 1000, 5.0))
    monkeypatch.setattr(latency.time, "monotonic", lambda: float(next(clock)))
    plan, timings = fake_plan(tmp_path, budget_seconds=70.0)
    measure(timings, plan)
    assert len(made) == 7


def test_a_machine_that_is_never_quiet_is_measured_and_said_to_be_noisy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_rounds(monkeypatch, disturbed=lambda number: True)
    plan, timings = fake_plan(tmp_path)
    measure(timings, plan)
    assert len(made) == 9
    assert len(timings.kept) == 6
    assert timings.measurement()["noisy"]


def test_rounds_go_on_to_the_half_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_rounds(monkeypatch, disturbed=lambda number: False, spread=0.05)
    plan, timings = fake_plan(tmp_path, half_width=0.03, budget_seconds=60.0)
    measure(timings, plan)
    low, high = timings.interval(timings.log_ratios("b", "a", LABELS[0]), 0.9)
    assert (high - low) / 2 <= 0.03
    assert 6 < len(made) < 40


def test_rounds_end_with_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_rounds(monkeypatch, disturbed=lambda number: False, spread=0.05)
    clock = iter(np.arange(0, 1000, 5.0))  # seconds: two looks a round
    monkeypatch.setattr(latency.time, "monotonic", lambda: float(next(clock)))
    plan, timings = fake_plan(tmp_path, half_width=1e-6, budget_seconds=100.0)
    measure(timings, plan)
    assert len(made) == 10


def test_measuring_again_adds_as_many_rounds_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rounds(monkeypatch, disturbed=lambda number: False, spread=0.05)
    plan, timings = fake_plan(tmp_path)
    measure(timings, plan)
    measure(timings, replace(plan, half_width=1e-6, budget_seconds=1e6))
    assert len(timings.rounds) == 12
    assert timings.attempts == 2
