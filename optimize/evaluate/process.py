"""A worker seen from outside: start it, ask it, stop and continue it, end it, and say clearly what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.evaluate.timings import Setting

PATIENCE_SECONDS = 600.0
"""A worker that says nothing for so long is taken for hung (loading a large model from a slow disk takes minutes)."""
CAN_STOP = hasattr(signal, "SIGSTOP")


class Worker:
    """One fresh process that serves one artifact. Use `workers`, which ends them all whatever happens."""

    def __init__(self, name: str, artifact: Artifact, threads: int, folder: Path) -> None:
        self.name = name
        self.artifact = artifact
        self.threads = threads
        self._errors = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `end`)
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "optimize.evaluate.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(threads),
            # Not where the user stands: Python before 3.11 would import modules from there.
            cwd=folder,
            # Ctrl-C on a terminal goes to us alone; we end the workers.
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **request: Any) -> None:
        """Ask without waiting, so that several workers can load at once."""
        assert self._process.stdin is not None
        # A worker that is gone is noticed by `reply`, which can say why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()

    def reply(self, patience: float | None = None) -> dict[str, Any]:
        """The answer to the oldest question. Raises `EvaluationError` on an error, an exit, or silence."""
        patience = PATIENCE_SECONDS if patience is None else patience
        try:
            line = self._lines.get(timeout=patience)
        except queue.Empty:
            raise self._error(
                f"it did not answer within {patience:.0f} s", "the model hangs, or the machine is far too busy"
            ) from None
        if not line.endswith(b"\n"):  # the end of the output, perhaps in the middle of an answer
            code = self._process.wait()
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            hint = "it may have run out of memory" if code == -9 else None
            raise self._error(f"its process {reason}", hint)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def ask(self, do: str, *, patience: float | None = None, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.reply(patience)

    def send_open(self, inputs: Sequence[Path], settings: Sequence[Setting]) -> None:
        """`inputs` are `.npz` files, one for each setting."""
        self.send(
            "open",
            format=self.artifact.format,
            path=str(self.artifact.path.absolute()),
            threads=self.threads,
            trust_remote_code=self.artifact.trust_remote_code,
            inputs=[{"file": str(path), **setting.to_json()} for path, setting in zip(inputs, settings, strict=True)],
        )

    def stop(self) -> None:
        """Hold every thread where it stands, so that no thread pool spins while others are measured."""
        self._signal("SIGSTOP")

    def go_on(self) -> None:
        self._signal("SIGCONT")

    def end(self) -> None:
        """Kill it (stopped or not) and wait until it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _signal(self, name: str) -> None:
        if CAN_STOP and self._process.poll() is None:
            os.kill(self.pid, getattr(signal, name))

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            for line in replies:
                self._lines.put(line)
        self._lines.put(b"")

    def _error(self, what: str, hint: str | None = None) -> EvaluationError:
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace").strip().splitlines()[-12:]
        said = "\n  it said:\n" + "\n".join(f"    {line}" for line in tail) if tail else ""
        return EvaluationError(f"could not measure {self.name}: {what}{said}", stage=self.name, hint=hint)


@contextlib.contextmanager
def workers(artifacts: Sequence[tuple[str, Artifact]], threads: int, folder: Path) -> Iterator[list[Worker]]:
    """One new process for each (name, artifact), all started at once; none is left behind, whatever happens."""
    started: list[Worker] = []
    try:
        for name, artifact in artifacts:
            started.append(Worker(name, artifact, threads, folder))
        yield started
    finally:
        for worker in started:
            worker.end()


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    # What binds or counts threads or pages is ours to say, and the same for all.
    for name in ("THP_MEM_ALLOC_ENABLE", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
        environment.pop(name, None)
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM", "RAYON"):
        environment[f"{name}_NUM_THREADS"] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in environment:
        folders = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(folder).absolute()) for folder in folders if folder)
    return environment
