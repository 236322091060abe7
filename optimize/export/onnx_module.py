"""A PyTorch module of the user's own as an ONNX graph, by `torch.onnx.export`: the batch is free, all else fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimize.runtimes.pytorch import named

if TYPE_CHECKING:
    import onnx_ir

    from optimize.tasks import Inputs


def export_module(model: Any, sample: Inputs, opset: int | None) -> onnx_ir.Model:
    """`sample` is a batch of two or more rows; the graph's inputs have its names. Raises whatever torch does."""
    import torch

    tensors = tuple(map(torch.from_numpy, sample.values()))
    with torch.inference_mode():
        outputs = list(named(model(*tensors)))
    batch = torch.export.Dim("batch")
    # Shapes by position: whatever the parameters of `forward` are called.
    program = torch.export.export(model, tensors, dynamic_shapes=_shapes(model, len(tensors), batch), strict=False)
    exported = torch.onnx.export(
        program, input_names=list(sample), output_names=outputs, opset_version=opset, dynamo=True, verbose=False
    )
    assert exported is not None
    return exported.model


def _shapes(model: Any, count: int, batch: Any) -> Any:
    import inspect

    parameters = list(inspect.signature(model.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (tuple({0: batch} for _ in range(count)),)
    return tuple({0: batch} for _ in range(count))
