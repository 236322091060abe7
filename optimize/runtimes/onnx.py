"""ONNX Runtime on the CPU.

Denormal numbers are kept (its default, and PyTorch's), so that both runtimes do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL = "model.onnx"
LEARNT = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "INT8", "UINT8", "INT4", "UINT4")
"""Element types of parameters."""


class OnnxRunner:
    """A loaded graph."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.takes = tuple(value.name for value in session.get_inputs())
        self.gives = tuple(value.name for value in session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if missing := [name for name in self.takes if name not in inputs]:
            raise EvaluationError(f"the model wants {', '.join(missing)}, which its tokenizer does not give")
        try:
            arrays = self.session.run(None, {name: inputs[name] for name in self.takes})
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise EvaluationError(f"the model can't take these inputs: {error}") from error
        return dict(zip(self.gives, map(_float32, arrays), strict=True))


def _float32(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype("float32") if array.dtype.kind == "f" and array.dtype != "float32" else array


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> OnnxRunner:
    """`model.onnx` of the folder. A graph has no code, so trust changes nothing.

    A folder from outside has to pass `source.vetting.check_graph` first; it is not repeated here, since reading a graph
    twice would show in the time and memory that are measured.
    """
    import onnxruntime

    path = directory / MODEL
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Else the file's own bytes decide how it is read.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EvaluationError(f"ONNX Runtime can't open it: {error}", location=str(path)) from error
    return OnnxRunner(session)


def parameters(directory: Path) -> int:
    """Elements of the initialisers that a model learns; quantised ones count like the floats they stand for."""
    import onnx

    graph = onnx.load(directory / MODEL, load_external_data=False).graph
    learnt = {onnx.TensorProto.DataType.Value(name) for name in LEARNT}
    return sum(prod(tensor.dims) for tensor in graph.initializer if tensor.dims and tensor.data_type in learnt)
