"""Export to a program of `torch.export` (https://docs.pytorch.org/docs/stable/export.html), PyTorch's own format for
deployment and the heir of TorchScript.

    stages:
      - export: torch_export
        aot_inductor: true

The file, `model.pt2`, takes the model's inputs by name, at every batch size and length, and gives a dictionary of named
outputs: `torch.export.load("model.pt2").module()(input_ids=..., attention_mask=...)`. It holds weights as plain bytes
and nothing pickled, and the same input gives the same bytes.

As it is, the program runs as fast as PyTorch does. With `aot_inductor`, AOTInductor compiles it to machine code, with
weights laid out for this processor: on MiniLM that takes half of the time, and INT8 layers of torchao (`quantize: int8`
with `backend: torchao` before this stage) less still. Such code serves one kind of processor and one version of
PyTorch, and no two compilations give the same bytes. So the artifact is the program. It is compiled where it is opened,
once, and kept in the cache (`OPTIMIZE_CACHE`); this stage does so for the machine that it runs on. To ship the machine
code itself, give the program to `torch._inductor.aoti_compile_and_package`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.export.answering import Parent, open_parent
from optimize.export.failures import failed
from optimize.quiet import quiet
from optimize.runtimes import aot_inductor
from optimize.runtimes.torch_export import MODEL, NOTES

if TYPE_CHECKING:
    from pathlib import Path

    import torch

VERSION = 1

_HINT = "use export: onnx"


class Config(Block):
    """`export: torch_export`."""

    aot_inductor: bool = False
    """Compile to machine code where the file is opened; needs a C++ compiler there and here."""
    tolerance: float | None = Field(None, gt=0)
    """The largest absolute difference from the parent's outputs on real rows; more is an error. By default 1e-4; of a
    model on integer codes, whose activations may be rounded the other way after the least change, 0.3 (of MiniLM by
    torchao, the same row alone and in a batch already differs by 0.11)."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently, and where
    `aot_inductor` finds no C++ compiler.
    """
    if config.aot_inductor:
        aot_inductor.check_compiler()
    context.update(0, 3, "loading")
    parent = open_parent(artifact, context)
    parameters = sum(tensor.numel() for tensor in parent.module.parameters())
    context.update(1, 3, "tracing")
    with quiet():
        program = _program(parent)
    notes = {"inputs": list(parent.sample), "parameters": parameters, "aot_inductor": config.aot_inductor}
    notes["torchao"] = any(str(node.target).startswith("torchao") for node in program.graph.nodes)
    _save(program, context.directory / MODEL, notes)
    context.update(2, 3, "compiling" if config.aot_inductor else "comparing with the parent")
    hint = "try aot_inductor: false; raise `tolerance` only if such a difference is harmless"
    return Artifact.from_directory(
        context.directory,
        format="torch_export",
        task=artifact.task,
        details={
            "aot_inductor": config.aot_inductor,
            **parent.check.compare("torch_export", config.tolerance or (0.3 if notes["torchao"] else 1e-4), hint),
        },
        trust_remote_code=artifact.trust_remote_code,
    )


def _program(parent: Parent) -> torch.export.ExportedProgram:
    """The program for inputs of any batch size and, of tokens, any length."""
    import torch
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    module: Any = parent.module
    auto = torch.export.Dim.AUTO
    # Sizes of pixels are the architecture's.
    free = {name: range(1 if tensor.is_floating_point() else tensor.dim()) for name, tensor in parent.sample.items()}
    try:
        program = torch.export.export(
            _without_subclasses(module),
            (),
            parent.sample,
            dynamic_shapes={name: dict.fromkeys(axes, auto) for name, axes in free.items()},
        )
    except Exception as error:  # it raises whatever the model's code does
        raise failed(error, parent.model, _HINT) from error
    for node in program.graph.nodes:
        for axis in free.get(node.name, ()) if node.op == "placeholder" else ():
            size = node.meta["val"].shape[axis]
            if is_concrete_int(size):
                raise StageError(
                    f"the model can't be exported: its code takes axis {axis} of {node.name} for the fixed size {size}",
                    hint=_HINT,
                )
    return program


def _without_subclasses(model: Any) -> Any:
    """With the codes and scales of torchao's tensors as tensors of their own, which need no pickle."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if any(is_traceable_wrapper_subclass(tensor) for tensor in model.parameters()):
        from torchao.utils import unwrap_tensor_subclass

        unwrap_tensor_subclass(model.requires_grad_(False))
    return model


def _save(program: torch.export.ExportedProgram, path: Path, notes: dict[str, Any]) -> None:
    """The same bytes every time, without rows of the data and paths."""
    import torch

    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in ("stack_trace", "source_fn_stack", "from_node", "torch_fn"):
                node.meta.pop(key, None)
    program._example_inputs = None
    torch.export.save(program, path, extra_files={NOTES: json.dumps(notes, sort_keys=True)})
