"""ONNX Runtime on the CPU.

Denormal numbers are kept (its default, and PyTorch's), so that both runtimes do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError
from optimize.runtimes import fixed_shapes
from optimize.runtimes.onnx_seq2seq import DECODER, ENCODER, OnnxSeq2SeqRunner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODEL = "model.onnx"
LEARNT = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "INT8", "UINT8", "INT4", "UINT4")
"""Element types of parameters."""
_PAST, _PRESENT, _KEEP = "past_key_values", "present", "logits_to_keep"


class OnnxRunner:
    """A loaded graph."""

    def __init__(self, session: Any) -> None:
        self.session = session
        # Of a decoder; `logits_to_keep` is no input here, since it has a default.
        self.caches = {value.name: value.shape for value in session.get_inputs() if value.name.startswith(_PAST)}
        self.takes = tuple(value.name for value in session.get_inputs() if value.name not in self.caches)
        self.gives = tuple(value.name for value in session.get_outputs() if not value.name.startswith(_PRESENT))
        # Sizes that the graph insists on; those of pixels go without saying.
        sizes = [value.shape for value in session.get_inputs() if value.name in self.takes]
        self._batch = next((shape[0] for shape in sizes if shape and isinstance(shape[0], int)), None)
        self._length = next((shape[1] for shape in sizes if len(shape) == 2 and isinstance(shape[1], int)), None)
        self._long = {value.name for value in session.get_outputs() if value.shape[1:2] == ["length"]}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Of a decoder, one forward from the beginning: its caches start empty, and are thrown away."""
        if missing := [name for name in self.takes if name not in inputs]:
            raise EvaluationError(f"the model wants {', '.join(missing)}, which its tokenizer does not give")
        given = {name: inputs[name] for name in self.takes}
        if self.caches:
            given |= self._empty_caches(inputs["attention_mask"])
        if self._batch or self._length:
            return fixed_shapes.answer(given, self._batch, self._length, self._run, self._long)
        return self._run(given)

    def _run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            arrays = self.session.run(list(self.gives), dict(given))
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise EvaluationError(f"the model can't take these inputs: {error}") from error
        return dict(zip(self.gives, map(_float32, arrays), strict=True))

    def _empty_caches(self, mask: NDArray[Any]) -> dict[str, NDArray[Any]]:
        import numpy as np

        if (mask[:, 1:] > mask[:, :-1]).any() or not mask[:, 0].all():
            # The operator counts a row's tokens and takes the first so many.
            raise EvaluationError("the model can't take these inputs: rows must be padded on the right")
        return {
            name: np.empty((len(mask), shape[1], 0, shape[3]), dtype=np.float32) for name, shape in self.caches.items()
        }

    def decoder(self, max_length: int) -> OnnxDecoder:
        return OnnxDecoder(self, max_length)


class OnnxDecoder:
    """A sequence whose cache is laid out once for `max_length` tokens, and to which every step appends in place.

    Past and present of a layer are the same memory, which `GroupQueryAttention` understands; nothing is copied from
    step to step, and forgetting tokens is counting fewer.
    """

    def __init__(self, runner: OnnxRunner, max_length: int) -> None:
        import numpy as np
        from onnxruntime import OrtValue

        self.length = 0
        self._session = runner.session
        if not runner.caches or _KEEP not in (value.name for value in self._session.get_overridable_initializers()):
            raise EvaluationError(
                "the model is no decoder with a key/value cache",
                hint="export a causal language model with export: onnx",
            )
        self._binding = self._session.io_binding()
        self._ids = np.zeros((1, max_length), dtype=np.int64)
        self._mask = np.ones((1, max_length), dtype=np.int64)
        self._caches = {
            name: OrtValue.ortvalue_from_shape_and_type([1, shape[1], max_length, shape[3]], np.float32)
            for name, shape in runner.caches.items()
        }
        for name, cache in self._caches.items():
            self._binding.bind_ortvalue_input(name, cache)
            self._binding.bind_ortvalue_output(name.replace(_PAST, _PRESENT, 1), cache)
        (vocabulary,) = (value.shape[2] for value in self._session.get_outputs() if value.name == "logits")
        self._logits = np.zeros((1, 1, vocabulary), dtype=np.float32)
        self._bind("logits", self._logits, self._logits.shape, output=True)
        self._keep = np.ones(1, dtype=np.int64)
        self._bind(_KEEP, self._keep, self._keep.shape)

    def _bind(self, name: str, array: NDArray[Any], shape: tuple[int, ...], *, output: bool = False) -> None:
        """Let the graph read or write the beginning of an array of ours, which has to outlive the binding."""
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        count = len(input_ids)
        end = self.length + count
        if not count or end > self._ids.shape[1]:
            raise EvaluationError(f"a sequence of {end} tokens does not fit in {self._ids.shape[1]}")
        self._ids[0, :count] = input_ids
        self._bind("input_ids", self._ids, (1, count))
        self._bind("attention_mask", self._mask, (1, end))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise EvaluationError(f"the model can't take these inputs: {error}") from error
        self.length = end
        return self._logits[0, 0]  # type: ignore[no-any-return]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


def _float32(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype("float32") if array.dtype.kind == "f" and array.dtype != "float32" else array


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> OnnxRunner | OnnxSeq2SeqRunner:
    """`model.onnx` of the folder, or `encoder.onnx` and `decoder.onnx`. A graph has no code, so trust changes nothing.

    A folder from outside has to pass `source.vetting.check_graph` first; it is not repeated here, since reading a graph
    twice would show in the time and memory that are measured.
    """
    if (directory / DECODER).exists():
        return OnnxSeq2SeqRunner(_load(directory / ENCODER, threads), _load(directory / DECODER, threads), directory)
    return OnnxRunner(_load(directory / MODEL, threads))


def _load(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Else the file's own bytes decide how it is read.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EvaluationError(f"ONNX Runtime can't open it: {error}", location=str(path)) from error


def parameters(directory: Path) -> int:
    """Elements of the initialisers that a model learns; quantised ones count like the floats they stand for."""
    return sum(_parameters(path) for path in sorted(directory.glob("*.onnx")))


def _parameters(path: Path) -> int:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    learnt = {onnx.TensorProto.DataType.Value(name) for name in LEARNT}
    sizes = {
        tensor.name: prod(tensor.dims) for tensor in graph.initializer if tensor.dims and tensor.data_type in learnt
    }
    for node in graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type in ("MatMulNBits", "MatMulBnb4"):  # codes in bytes, and what describes their grid
            sizes |= {name: 0 for name in node.input[2:5] if name in sizes}
            sizes[node.input[1]] = attributes["K"] * attributes["N"]
        elif node.op_type == "GatherBlockQuantized":
            sizes |= {name: 0 for name in node.input[2:4] if name in sizes}
        elif node.op_type == "GroupQueryAttention":  # tables of the positions' rotations
            sizes |= {name: 0 for name in node.input[7:9] if name in sizes}
    return sum(sizes.values())
