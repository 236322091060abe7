"""Export to TorchScript, which a C++ program can run with LibTorch and no Python.

    stages:
      - export: torchscript
        method: trace
        freeze: true

PyTorch deprecates TorchScript and names `torch.export` as its heir (`export: torch_export`); what loads it today goes
on to work. On MiniLM it is as fast as PyTorch itself.

`trace` notes what the model computes for real rows. A decision that its Python code takes by the look of its inputs is
noted as it was taken: the stage traces once more with other rows, and warns where that gives another program.
`script` translates the code itself, with its decisions; it is for plain PyTorch modules, whose code is simple enough:
models of transformers refuse it.

The file, `model.pt`, takes the model's inputs and gives a dictionary of named outputs (a scripted module gives what it
always gave). It holds no line of the source, and the same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.export.answering import Parent, open_parent
from optimize.export.failures import failed
from optimize.quiet import quiet
from optimize.runtimes.torchscript import MODEL, NOTES

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1

_LEFT_OUT = (".debug_pkl", "/.data/", "/traced_inputs", "/version")
"""Records that hold lines of source files with their paths, the rows that were traced, or what the writer adds."""


class Config(Block):
    """`export: torchscript`."""

    method: Literal["trace", "script"] = "trace"
    """`trace`: what the model computes for real rows. `script`: its code, translated; for plain PyTorch modules."""
    freeze: bool = True
    """Make constants of the weights, and compute ahead what follows from them alone."""
    optimize_for_inference: bool = False
    """Let PyTorch pack weights for oneDNN when the file is opened, which is meant for convolutions. Needs `freeze`."""
    tolerance: float = Field(1e-4, gt=0)
    """The largest absolute difference from the parent's outputs on real rows; more is an error."""

    @model_validator(mode="after")
    def _frozen(self) -> Config:
        if self.optimize_for_inference and not self.freeze:
            raise ValueError("optimize_for_inference needs freeze: true")
        return self


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
    context.update(0, 3, "loading")
    parent = open_parent(artifact, context)
    context.update(1, 3, "tracing" if config.method == "trace" else "scripting")
    program, decided = _program(parent, parent.sample, config)
    if decided:
        again, _ = _program(parent, parent.other, config)
        if not _same(program, again):
            context.warn(
                f"tracing has fixed what other rows decide differently, at {', '.join(decided)}: answers to inputs of "
                "other sizes or padding may be wrong"
            )
    notes = {
        "inputs": list(parent.sample),
        "parameters": sum(tensor.numel() for tensor in parent.module.parameters()),
        "optimize_for_inference": config.optimize_for_inference,
    }
    _save(program, context.directory / MODEL, context.scratch / "raw.pt", notes)
    context.update(2, 3, "comparing with the parent")
    hint = (
        "a size or a branch may have been fixed while tracing: use export: torch_export or onnx; raise `tolerance` "
        "only if such a difference is harmless"
    )
    return Artifact.from_directory(
        context.directory,
        format="torchscript",
        task=artifact.task,
        details={"method": config.method, **parent.check.compare("torchscript", config.tolerance, hint)},
        trust_remote_code=artifact.trust_remote_code,
    )


def _program(parent: Parent, sample: dict[str, Tensor], config: Config) -> tuple[Any, list[str]]:
    """(the program, where tracing saw the code decide something: `folder/file.py:line`)."""
    import torch

    try:
        with quiet(), _names_from_zero(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            if config.method == "script":
                program = torch.jit.script(parent.model)
            else:
                inputs = tuple(sample.values())
                # `strict` would forbid a dictionary as the answer.
                program = torch.jit.trace(  # type: ignore[no-untyped-call]
                    parent.module, inputs, strict=False, check_trace=False, _store_inputs=False
                )
            if config.freeze:
                program = torch.jit.freeze(program)
    except Exception as error:  # it raises whatever the model's code does
        raise failed(error, parent.model, "use export: torch_export or onnx") from error
    places = [f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}" for warning in caught]
    return program, sorted(set(places))


def _same(program: Any, other: Any) -> bool:
    """Whether both compute the same from the same constants."""
    import torch

    def equal(one: Any, another: Any) -> bool:
        return torch.equal(one, another) if isinstance(one, torch.Tensor) else bool(one == another)

    (code, held), (other_code, others) = program.code_with_constants, other.code_with_constants
    constants, other_constants = held.const_mapping, others.const_mapping
    return (
        code == other_code
        and constants.keys() == other_constants.keys()
        and all(equal(value, other_constants[name]) for name, value in constants.items())
    )


@contextlib.contextmanager
def _names_from_zero() -> Iterator[None]:
    """TorchScript numbers the types that it makes through the whole process, and writes these numbers into files."""
    import torch

    state, store = torch.jit._state, torch.jit._recursive.concrete_type_store
    unit, types = state._python_cu, store.type_store
    state._python_cu, store.type_store = torch._C.CompilationUnit(), {}
    try:
        yield
    finally:
        state._python_cu, store.type_store = unit, types


def _save(program: Any, path: Path, raw: Path, notes: dict[str, Any]) -> None:
    """Write the archive without what differs from time to time or says where the source lay."""
    import torch

    program.save(str(raw), _extra_files={NOTES: json.dumps(notes, sort_keys=True)})
    reader = torch._C.PyTorchFileReader(str(raw))
    writer = torch._C.PyTorchFileWriter(str(path))
    names = reader.get_all_records()
    writer.set_min_version(int(reader.get_record(next(name for name in names if name.endswith("version")))))
    for name in names:
        if not any(part in f"/{name}" for part in _LEFT_OUT):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    raw.unlink()
