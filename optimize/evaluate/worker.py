"""The fresh process that serves one artifact while it is measured: `python -m optimize.evaluate.worker`.

It reads one JSON object a line from standard input and answers each with one line on standard output. A library that
prints can't break this: the two pipes are kept aside, and everybody else's standard output becomes standard error.

    {"do": "open", "format": "onnx", "path": "...", "threads": 1, "trust_remote_code": false, "inputs": ["a.npz", ...]}
    {"do": "pin", "cores": [1]}
    {"do": "warm", "input": 0, "seconds": 2.0} -> {"call_seconds": 0.004}
    {"do": "run", "input": 0, "calls": 5, "lead_in": true} -> {"seconds": [0.004, ...], "cpu", "waited", "switches"}
    {"do": "peak"} -> {"bytes": 123456789}

It ends when standard input does. It imports NumPy and the format's runtime, nothing else of weight.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

WINDOW_SECONDS = 0.02
"""Warm-up is watched in windows of about so long (at least one call)."""
FEWEST_WINDOWS = 2
LEAST_SECONDS = 0.1
STEADY = 0.97
"""Warm-up is over when a window is not faster than this share of the fastest one before it."""


class Served:
    """An open model and the inputs it is measured with."""

    def __init__(self, format: str, path: str, threads: int, trust_remote_code: bool, inputs: list[str]) -> None:
        import numpy as np

        from optimize import runtimes

        self.runner = runtimes.get(format).open(Path(path), threads, trust_remote_code=trust_remote_code)
        self.inputs = []
        for name in inputs:
            with np.load(name, allow_pickle=False) as arrays:
                self.inputs.append({key: arrays[key] for key in arrays.files})
        # Whatever loading left behind is none of the collector's business while we measure.
        gc.collect()
        gc.freeze()
        self.denormals = bool(np.float32(1e-38) * np.float32(1e-2) > 0)

    def call(self, input: int) -> float:
        inputs = self.inputs[input]
        start = time.perf_counter()
        self.runner.run(inputs)
        return time.perf_counter() - start

    def warm(self, input: int, seconds: float) -> dict[str, float]:
        """Call until it gets no faster, or for so many seconds. Told is the fastest call, the least disturbed."""
        start = time.perf_counter()
        fastest = self.call(input)
        calls = max(1, round(WINDOW_SECONDS / max(fastest, 1e-6)))
        windows: list[float] = []
        while True:
            window = [self.call(input) for _ in range(calls)]
            fastest = min(fastest, *window)
            windows.append(statistics.median(window))
            elapsed = time.perf_counter() - start
            if len(windows) < FEWEST_WINDOWS or elapsed < LEAST_SECONDS:
                continue
            if windows[-1] >= STEADY * min(windows[:-1]) or elapsed > seconds:
                return {"call_seconds": fastest}

    def run(self, input: int, calls: int, lead_in: bool) -> dict[str, Any]:
        """Timed calls; with `lead_in` one more goes ahead untimed, since others have emptied the caches meanwhile.

        Usage counts the lead-in too: what runs on our processors and is not accounted for passes for somebody else's.
        """
        before = _usage()
        if lead_in:
            self.call(input)
        seconds = [self.call(input) for _ in range(calls)]
        after = _usage()
        waited = None if after[1] is None or before[1] is None else after[1] - before[1]
        return {"seconds": seconds, "cpu": after[0] - before[0], "waited": waited, "switches": after[2] - before[2]}


def peak_bytes() -> int:
    """The most memory this process has held at once.

    `VmHWM` belongs to the address space and starts anew at exec; `ru_maxrss` would inherit the parent's peak on Linux.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def pin(cores: list[int]) -> None:
    """Bind every thread of this process to the same processors."""
    if hasattr(os, "sched_setaffinity"):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setaffinity(int(thread.name), cores)


def main() -> None:
    """Serve until standard input ends."""
    requests, replies = _take_pipes()
    _die_with_parent()
    commands: dict[str, Callable[..., dict[str, Any] | None]] = {"pin": pin, "peak": lambda: {"bytes": peak_bytes()}}

    def open_model(**request: Any) -> dict[str, Any]:
        served = Served(**request)
        commands.update(warm=served.warm, run=served.run)
        return {"denormals": served.denormals}

    commands["open"] = open_model
    for line in requests:
        request = json.loads(line)
        try:
            reply = commands[request.pop("do")](**request) or {}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": getattr(error, "message", None) or f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _take_pipes() -> tuple[TextIO, TextIO]:
    """Keep the two pipes for the protocol: what else reads gets nothing, what else prints goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the parent is gone: a stopped process would never see its input end."""
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def _usage() -> tuple[float, float | None, int]:
    """(seconds on a processor, seconds ready but not running, involuntary switches) of all threads so far."""
    try:
        waited: float | None = (
            sum(int((thread / "schedstat").read_text().split()[1]) for thread in Path("/proc/self/task").iterdir())
            / 1e9
        )
    except (OSError, IndexError):
        waited = None
    try:
        import resource

        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except ImportError:
        switches = 0
    return time.process_time(), waited, switches


if __name__ == "__main__":
    main()
