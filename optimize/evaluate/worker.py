"""The fresh process that serves one artifact while it is measured: `python -m optimize.evaluate.worker`.

It reads one JSON object a line from standard input and answers each with one line on standard output. A library that
prints can't break this: the two pipes are kept aside, and everybody else's standard output becomes standard error.

    {"do": "open", "format": "onnx", "path": "...", "threads": 1, "trust_remote_code": false,
     "inputs": [{"file": "a.npz"}, {"file": "b.npz", "phase": "decode", "prompt_length": 128}]}
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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.runtimes import Decoder

WINDOW_SECONDS = 0.02
"""Warm-up is watched in windows of about so long (at least one call)."""
FEWEST_WINDOWS = 2
LEAST_SECONDS = 0.1
STEADY = 0.97
"""Warm-up is over when a window is not faster than this share of the fastest one before it."""


class Text:
    """The sequence of an open decoder. All settings share it, as a user has one: its cache is part of the memory."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.held: NDArray[np.int64] | None = None
        """What is read, as far as the decoder has come."""

    def prefill(self, text: NDArray[np.int64]) -> float:
        """Seconds from an empty sequence to the first token after the text."""
        self.decoder.truncate(0)
        self.held = text
        return self._choose(text)

    def decode(self, text: NDArray[np.int64], prompt_length: int) -> float:
        """Seconds that the text's next token takes. At the text's end it goes on from the prompt's end again."""
        if self.held is not text:
            if not self._holds(text[:prompt_length]):
                self.prefill(text[:prompt_length])
            self.held = text
            self.decoder.truncate(prompt_length)
        elif self.decoder.length == len(text):
            self.decoder.truncate(prompt_length)
        return self._choose(text[self.decoder.length :][:1])

    def _holds(self, prompt: NDArray[np.int64]) -> bool:
        """Whether the sequence begins so: prompts of several lengths are of one text, and reading one takes a while."""
        return self.held is not None and self.held[: self.decoder.length][: len(prompt)].tolist() == prompt.tolist()

    def _choose(self, tokens: NDArray[np.int64]) -> float:
        start = time.perf_counter()
        # A token is there once it is chosen: that is a part of what a user waits for, and a lazy runtime can't be late.
        self.decoder.forward(tokens).argmax()
        return time.perf_counter() - start


class Served:
    """An open model and the calls it is measured with, one for each setting; each gives its seconds."""

    def __init__(
        self, format: str, path: str, threads: int, trust_remote_code: bool, inputs: Sequence[dict[str, Any]]
    ) -> None:
        import numpy as np

        from optimize import runtimes

        self.runner = runtimes.get(format).open(Path(path), threads, trust_remote_code=trust_remote_code)
        loaded = []
        for one in inputs:
            with np.load(one["file"], allow_pickle=False) as arrays:
                loaded.append({key: arrays[key] for key in arrays.files})
        if any("phase" in one for one in inputs):
            text = Text(self.runner.decoder(max(arrays["input_ids"].shape[1] for arrays in loaded)))
        self.calls: list[Callable[[], float]] = []
        for one, arrays in zip(inputs, loaded, strict=True):
            if "phase" not in one:
                self.calls.append(partial(self.answer, arrays))
            elif one["phase"] == "prefill":
                self.calls.append(partial(text.prefill, arrays["input_ids"][0]))
            else:
                self.calls.append(partial(text.decode, arrays["input_ids"][0], one["prompt_length"]))
        # Whatever loading left behind is none of the collector's business while we measure.
        gc.collect()
        gc.freeze()
        self.denormals = bool(np.float32(1e-38) * np.float32(1e-2) > 0)

    def answer(self, inputs: Mapping[str, NDArray[Any]]) -> float:
        start = time.perf_counter()
        self.runner.run(inputs)
        return time.perf_counter() - start

    def warm(self, input: int, seconds: float) -> dict[str, float]:
        """Call until it gets no faster, or for so many seconds. Told is the fastest call, the least disturbed."""
        start = time.perf_counter()
        fastest = self.calls[input]()
        calls = max(1, round(WINDOW_SECONDS / max(fastest, 1e-6)))
        windows: list[float] = []
        while (elapsed := time.perf_counter() - start) <= seconds:
            enough = len(windows) >= FEWEST_WINDOWS and elapsed >= LEAST_SECONDS
            if enough and windows[-1] >= STEADY * min(windows[:-1]):
                break
            window = [self.calls[input]() for _ in range(calls)]
            fastest = min(fastest, *window)
            windows.append(statistics.median(window))
        return {"call_seconds": fastest}

    def run(self, input: int, calls: int, lead_in: bool) -> dict[str, Any]:
        """Timed calls; with `lead_in` one more goes ahead untimed, since others have emptied the caches meanwhile.

        Usage counts the lead-in too: what runs on our processors and is not accounted for passes for somebody else's.
        """
        before = _usage()
        if lead_in:
            self.calls[input]()
        seconds = [self.calls[input]() for _ in range(calls)]
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
