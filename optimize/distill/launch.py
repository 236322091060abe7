"""A training on several processes: `processes: 2` in a recipe.

The stage starts them itself with PyTorch's launcher, so that one run of `optimize apply` holds the store's lock and
judges the result, and only the training is done together. Each process runs the very same method; accelerate finds the
others by the environment, and only the first goes on behind the training and writes the artifact's files.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m optimize.distill.launch JOB

accelerate's own launcher does the same for GPUs, and wants MPI for processes on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import Data
from optimize.errors import OptimizeError, StageError
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.distill.training import LargeTraining

_JOB, _MADE, _FAILED = "job.json", "made.json", "failed-{}.json"
_PATIENCE_SECONDS = 30.0
"""For processes to end when they are told to."""


def run(module: str, artifact: Artifact, config: LargeTraining, context: Context) -> Artifact:
    """What `run` of a method makes of an artifact, trained by `config.processes` processes.

    Raises the `StageError` that one of them raised, or one that says how they ended.
    """
    with tempfile.TemporaryDirectory(dir=context.scratch) as scratch:
        folder = Path(scratch)
        job = {
            "module": module,
            "config": {**config.model_dump(mode="json"), "processes": 1},
            "artifact": _described(artifact),
            "artifacts": {name: _described(other) for name, other in context.artifacts.items()},
            "context": {name: str(getattr(context, name)) for name in ("directory", "scratch", "logs", "stage")},
            "task": context.task.name,
            "data": {field.name: getattr(context.data, field.name) for field in fields(Data)},
        }
        (folder / _JOB).write_text(json.dumps(job, default=str), encoding="utf-8")
        with (folder / "said").open("w+b") as said:
            code = _together(folder, config, context, said)
            if code or not (folder / _MADE).exists():
                raise _error(folder, code, said)
        return Artifact.from_manifest(context.directory, json.loads((folder / _MADE).read_bytes()))


def _together(folder: Path, config: LargeTraining, context: Context, said: Any) -> int:
    """Run them and pass on what the first tells; their exit code."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}"]
    process = subprocess.Popen(
        [*line, "--module", __name__, str(folder)],
        stdin=subprocess.PIPE,  # its end tells them that we are gone
        stdout=subprocess.PIPE,
        stderr=said,
        env=_environment(max(1, (config.threads or config.processes) // config.processes)),
        start_new_session=True,  # Ctrl-C on a terminal goes to us alone; we end them
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for told in process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(told)
                if "warning" in message:
                    context.warn(message["warning"])
                else:
                    context.update(message["done"], message["total"], message["text"])
        return process.wait()
    finally:
        process.stdin.close()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _environment(threads: int) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # Not from where the user stands: the package that runs is the one that runs here.
    ours = str(Path(__file__).absolute().parents[2])
    folders = [ours, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(each).absolute()) for each in folders if each)
    return environment


def _error(folder: Path, code: int, said: Any) -> StageError:
    for path in sorted(folder.glob(_FAILED.format("*"))):
        told = json.loads(path.read_bytes())
        return StageError(told["message"], hint=told["hint"])
    said.seek(0)
    tail = said.read().decode(errors="replace").strip().splitlines()[-12:]
    return StageError(
        "\n    ".join([f"the processes that train ended with exit code {code}; they said:", *tail]),
        hint="they may have run out of memory: a smaller batch_size, or fewer processes",
    )


def _described(artifact: Artifact) -> dict[str, Any]:
    return {"path": str(artifact.path), "manifest": artifact.manifest}


# In each of the processes


class _Told(Progress):
    """Passes on to the process that waits."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        self._say(done=done, total=total, text=text)

    def warn(self, name: str, message: str) -> None:
        self._say(warning=message)

    def _say(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()


def main(folder: Path) -> int:
    threading.Thread(target=_end_with_who_started, daemon=True).start()
    rank = int(os.environ["RANK"])
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no message
    job = json.loads((folder / _JOB).read_bytes())
    with _room(job, rank, _Told(stream)) as context:
        from optimize.distill.training import NotTheFirst

        method = import_module(job["module"])
        config = method.Config.model_validate({**job["config"], "threads": int(os.environ["OMP_NUM_THREADS"])})
        try:
            made = method.run(_artifact(job["artifact"]), config, context)
        except NotTheFirst:
            return 0
        except Exception as error:  # told by the process that waits
            known = isinstance(error, OptimizeError)
            message = error.message if isinstance(error, OptimizeError) else f"{type(error).__name__}: {error}"
            hint = error.hint if isinstance(error, OptimizeError) else None
            (folder / _FAILED.format(rank)).write_text(json.dumps({"message": message, "hint": hint}))
            if not known:
                raise
            return 1
    (folder / _MADE).write_text(json.dumps(made.manifest), encoding="utf-8")
    return 0


@contextlib.contextmanager
def _room(job: dict[str, Any], rank: int, told: Progress) -> Iterator[Context]:
    """The stage's room; whoever is not the first has a folder of its own, which is thrown away."""
    where = job["context"]
    data = job["data"]
    with tempfile.TemporaryDirectory() as aside:
        yield Context(
            directory=Path(where["directory"] if rank == 0 else aside),
            scratch=Path(where["scratch"]),
            task=tasks.get(job["task"]),
            data=Data(**{**data, "directory": Path(data["directory"]), "readable": tuple(data["readable"])}),
            logs=Path(where["logs"] if rank == 0 else aside),
            stage=where["stage"],
            artifacts={name: _artifact(other) for name, other in job["artifacts"].items()},
            progress=told if rank == 0 else Progress(),
        )


def _artifact(described: dict[str, Any]) -> Artifact:
    return Artifact.from_manifest(Path(described["path"]), described["manifest"])


def _end_with_who_started() -> None:
    """Standard input ends with the process that waits, however that ends."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
