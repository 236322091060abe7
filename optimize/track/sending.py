"""Sending in a process of its own, and within a time limit; what goes wrong is one line, without passwords."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import TrackingError
from optimize.masking import masked

if TYPE_CHECKING:
    from optimize.track import Target

_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY")
_ADDRESSES = ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
_LONGEST = 400
"""Characters of a library's message."""


def send(folder: Path, target: Target, base: Path | None = None) -> str:
    """Send the run in `folder` to a tracker, and say where it is now.

    `base` is where relative paths of the settings start; by default the folder of the run's recipe. Raises
    `TrackingError`.
    """
    job = {
        "to": target.to,
        "config": target.config.model_dump(mode="json"),
        "folder": str(folder.absolute()),
        "base": str(base or _base(folder)),
        "here": str(Path.cwd()),
    }
    with tempfile.TemporaryDirectory(prefix="optimize-") as place:
        said, replied = Path(place) / "said", Path(place) / "reply.json"
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", __package__, str(replied)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=_environment(),
                # Not where the user stands: Python before 3.11 would import modules from there.
                cwd=place,
                # Ctrl-C on a terminal goes to us alone; we end it, and what it started.
                start_new_session=True,
            )
        try:
            with contextlib.suppress(BrokenPipeError):
                process.communicate(json.dumps(job).encode(), timeout=target.config.timeout_seconds)
        except subprocess.TimeoutExpired:
            limit = f"{target.config.timeout_seconds:g} s"
            raise TrackingError(f"{target.to} did not take the run within {limit}, and was given up") from None
        finally:
            _end(process)
        reply = _reply(replied)
        if "where" in reply:
            return _masked(reply["where"], target)
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = reply.get("error") or f"its process ended with {process.returncode}: {''.join(lines[-1:])}"
        raise TrackingError(f"{target.to} did not take the run: {_masked(reason, target)}")


def _base(folder: Path) -> Path:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return Path(json.loads((folder / "recipe.json").read_bytes())["base"])
    return Path.cwd()


def _environment() -> dict[str, str]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if "PYTHONPATH" in environment:
        folders = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(one).absolute()) for one in folders if one)
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and whatever it started in its session, also where it ended by itself."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _reply(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _masked(text: Any, target: Target) -> str:
    """One line in which no password stands."""
    settings = [value for value in target.config.model_dump().values() if isinstance(value, str)]
    addresses = [*settings, *(os.environ.get(name) for name in _ADDRESSES)]
    secrets = [value for name in _SECRETS if (value := os.environ.get(name))]
    line = " ".join(masked(text, *addresses, secrets=secrets).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."
