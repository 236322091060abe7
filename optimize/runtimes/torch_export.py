"""Programs of `torch.export` on the CPU: as they are, or compiled by AOTInductor where they ask for it.

A `.pt2` file may hold pickles, which `torch.export.load` would open without a question: a file with any is refused.
Expressions in it are still evaluated as Python, so that a folder from outside is opened only where it is trusted
(`source.folder`).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError
from optimize.quiet import quiet
from optimize.runtimes.quantized import load_library
from optimize.runtimes.transformers import TorchRunner

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MODEL = "model.pt2"
NOTES = "optimize.json"
"""In the archive: {"inputs": names, "parameters": how many there were, "aot_inductor": whether to compile,
"torchao": whether its operators are torchao's}."""
_TENSORS = {
    "data/weights/model_weights_config.json": "weight_",
    "data/constants/model_constants_config.json": "tensor_",
}
"""Lists of tensors -> how the records begin that hold plain bytes."""


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> TorchRunner:
    """Load the program, and compile it first where it asks for that and the cache has no code of it."""
    from optimize.runtimes import aot_inductor

    path = directory / MODEL
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_pickles(archive)
            notes = json.loads(_read(archive, f"extra/{NOTES}"))
        with quiet():
            if notes["aot_inductor"]:
                program: Any = aot_inductor.load(path, torchao=notes["torchao"])
            else:
                program = load(path, torchao=notes["torchao"]).module()
    except (RuntimeError, ValueError, OSError, LookupError, AssertionError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"it is no program of `export: torch_export`: {error!r}", location=str(path)) from error
    return TorchRunner(program, threads, notes["inputs"])


def load(path: Path, *, torchao: bool) -> ExportedProgram:
    """Raises `EvaluationError` where it wants torchao, and that is not there."""
    import torch

    if torchao:  # else torch does not know the operators
        load_library("torchao.quantization", extra="torchao")
    return torch.export.load(path)


def parameters(directory: Path) -> int:
    """As many as were noted when the file was written: codes are told from scales no more."""
    with zipfile.ZipFile(directory / MODEL) as archive:
        return int(json.loads(_read(archive, f"extra/{NOTES}"))["parameters"])


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record below the archive's own folder."""
    folder = archive.namelist()[0].partition("/")[0]
    return archive.read(f"{folder}/{name}")


def _refuse_pickles(archive: zipfile.ZipFile) -> None:
    """Raises `EvaluationError` unless every tensor lies there as plain bytes."""
    if _read(archive, "data/sample_inputs/model.pt"):
        raise EvaluationError("it holds pickled example inputs, which could run code when loaded")
    for config, plain in _TENSORS.items():
        for name, tensor in json.loads(_read(archive, config))["config"].items():
            if tensor["use_pickle"] or not tensor["path_name"].startswith(plain):
                raise EvaluationError(f"it holds {name} pickled, which could run code when loaded")
