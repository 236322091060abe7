"""Programs of `torch.export` as machine code of this machine, made once by AOTInductor and kept in the cache.

A process of its own compiles, so that what compiling takes is neither time nor memory of the process that is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from optimize.errors import EvaluationError, StageError

_SETTINGS = {
    # Lays weights out for the processor; without it nothing is gained.
    "freezing": True,
    # Else the code is for the number of threads of the process that compiles.
    "cpp.dynamic_threads": True,
}


def check_compiler() -> None:
    """Raises `StageError` where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise StageError(
            "aot_inductor needs a C++ compiler, and none was found",
            hint="install g++ or clang++ (such as `apt-get install g++`), name one in CXX, or set aot_inductor: false",
        ) from error


def load(program: Path, *, torchao: bool) -> Any:
    """The compiled program: called with the inputs by name. Raises `EvaluationError` where it can't be compiled."""
    import torch

    return torch._inductor.aoti_load_package(str(_package(program, torchao)))


def _package(program: Path, torchao: bool) -> Path:
    """Where the machine code of a program lies; compiled now if it is not there."""
    import torch
    from filelock import FileLock

    from optimize.artifact import digest_of, sha256_file
    from optimize.evaluate.host import fingerprint
    from optimize.work import cache_folder

    key = digest_of(
        {
            "program": sha256_file(program),
            "settings": _SETTINGS,
            "torch": torch.__version__,
            "cpu": fingerprint()["cpu"]["model"],
            "flags": fingerprint()["cpu"]["flags"],
        }
    ).partition(":")[2]
    folder = cache_folder() / "aot_inductor"
    package = folder / f"{key}.pt2"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        if not package.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / package.name
                _compile_aside(program, made, torchao)
                made.replace(package)
    return package


def _compile_aside(program: Path, package: Path, torchao: bool) -> None:
    command = [sys.executable, "-m", __name__, str(program), str(package), *(["torchao"] if torchao else [])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(package.parent / "inductor")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it was killed"]
        raise EvaluationError(
            f"AOTInductor can't compile it: {lines[-1]}",
            hint="look for a C++ compiler of at least version 10 and for memory, or export without aot_inductor",
        )


def _compile(path: str, package: str, *torchao: str) -> None:
    import torch

    from optimize.runtimes import torch_export

    program: Any = torch_export.load(Path(path), torchao=bool(torchao))
    # It wants inputs to look at, and our files hold no rows of anybody's data: zeros, of the sizes that were traced.
    takes = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    examples = {}
    for node in takes:
        value = node.meta["val"]
        sizes = [getattr(getattr(size, "node", None), "hint", size) for size in value.shape]
        examples[node.name] = torch.zeros(sizes, dtype=value.dtype)
    program.example_inputs = ((), examples)
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=_SETTINGS)


if __name__ == "__main__":
    _compile(*sys.argv[1:])
