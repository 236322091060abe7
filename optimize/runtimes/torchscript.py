"""TorchScript on the CPU, with LibTorch's interpreter: no Python code of the model runs.

It is opened by `torch.jit.load` alone. The language can still read and write files, so that a folder from outside is
opened only where it is trusted (`source.folder`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError
from optimize.quiet import quiet
from optimize.runtimes.pytorch import named
from optimize.runtimes.transformers import TorchRunner

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL = "model.pt"
NOTES = "optimize.json"
"""In the archive: {"inputs": names, "parameters": how many there were, "optimize_for_inference": whether to}."""


class ScriptRunner(TorchRunner):
    """A loaded program, which takes its inputs by position."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        if missing := [name for name in self.takes if name not in inputs]:
            raise EvaluationError(f"the model wants {', '.join(missing)}, which its tokenizer does not give")
        with self.answering():
            outputs = named(self.model(*(torch.from_numpy(inputs[name]) for name in self.takes)))
        return {
            name: (value.float() if value.is_floating_point() else value).numpy() for name, value in outputs.items()
        }


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> ScriptRunner:
    """Load the program; it runs no code of the folder but itself."""
    import torch

    path = directory / MODEL
    found = {NOTES: ""}
    try:
        with quiet():
            program = torch.jit.load(str(path), map_location="cpu", _extra_files=found)  # type: ignore[no-untyped-call]
            notes = json.loads(found[NOTES])
            if notes["optimize_for_inference"]:
                # What it makes can't be saved.
                program = torch.jit.optimize_for_inference(program)
    except (RuntimeError, ValueError, OSError, LookupError) as error:
        raise EvaluationError(f"it is no program of `export: torchscript`: {error}", location=str(path)) from error
    return ScriptRunner(program, threads, notes["inputs"])


def parameters(directory: Path) -> int:
    """As many as were noted when the file was written: in a frozen program they are constants among others."""
    import zipfile

    with zipfile.ZipFile(directory / MODEL) as archive:
        notes = next(name for name in archive.namelist() if name.endswith(f"/extra/{NOTES}"))
        return int(json.loads(archive.read(notes))["parameters"])
