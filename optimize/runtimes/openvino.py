"""OpenVINO on the CPU.

Left alone it would compute in bfloat16 where the processor can. Here it computes in float32, unless the file itself
says otherwise (`export: openvino` with `precision: bf16` writes that into it); numbers quantised in the file stay so.
Denormal numbers are kept, as in the other runtimes, and threads are not tied to cores of OpenVINO's choosing, which
would be the same cores for every model that is measured beside this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from xml.etree import ElementTree

from optimize.errors import EvaluationError
from optimize.runtimes import fixed_shapes

if TYPE_CHECKING:
    import openvino
    from numpy.typing import NDArray

    from optimize.runtimes import Decoder

MODEL, WEIGHTS = "model.xml", "model.bin"
FLOATS = ("f64", "f32", "f16", "bf16")
CODES = ("i8", "u8", "i4", "u4", "i2", "u2", "nf4", "f8e4m3", "f8e5m2", "f8e8m0", "f4e2m1")
"""Element types of quantised weights."""
PRECISION = ["runtime_options", "INFERENCE_PRECISION_HINT"]
"""Where a file says what it computes in (of its `rt_info`)."""

Precision = Literal["f32", "bf16"]


def library() -> Any:
    """The module `openvino`, without its telemetry: importing it would send a message over the network."""
    # A None makes Python say that the package is not installed, with which OpenVINO and nncf are content.
    sys.modules.setdefault("openvino_telemetry", cast("Any", None))
    import openvino

    return openvino


class OpenvinoRunner:
    """A compiled model."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self.compiled = compiled
        self.takes = tuple(port.get_any_name() for port in compiled.inputs)
        self.gives = tuple(port.get_any_name() for port in compiled.outputs)
        self._request = compiled.create_infer_request()
        # Sizes that the model insists on; those of pixels, and of other floats, go without saying.
        sizes = [_sizes(port) for port in compiled.inputs]
        self._batch = next((size[0] for size in sizes if size and size[0] is not None), None)
        ids = [size for size, port in zip(sizes, compiled.inputs, strict=True) if port.get_element_type().is_integral()]
        self._length = next((size[1] for size in ids if len(size) == 2 and size[1] is not None), None)
        self._long = {
            name
            for name, port in zip(self.gives, compiled.outputs, strict=True)
            if self._length and _sizes(port)[1:2] == [self._length]
        }

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if missing := [name for name in self.takes if name not in inputs]:
            raise EvaluationError(f"the model wants {', '.join(missing)}, which its tokenizer does not give")
        given = {name: inputs[name] for name in self.takes}
        if self._batch or self._length:
            return fixed_shapes.answer(given, self._batch, self._length, self._run, self._long)
        return self._run(given)

    def _run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            # The request reads our arrays; what it gives is copied, since the next call writes over it.
            results = self._request.infer(list(given.values()), share_inputs=True)
        except (RuntimeError, TypeError, ValueError) as error:
            raise EvaluationError(f"the model can't take these inputs: {reason(error)}") from error
        return {
            name: array.astype("float32") if array.dtype.kind == "f" and array.dtype != "float32" else array
            for name, array in zip(self.gives, results.values(), strict=True)
        }

    def decoder(self, max_length: int) -> Decoder:
        raise EvaluationError(
            "an OpenVINO model is no decoder with a key/value cache here", hint="use export: onnx for language models"
        )


def _sizes(port: openvino.ConstOutput) -> list[int | None]:
    """Of each axis; None where it is free."""
    shape = port.get_partial_shape()
    return [] if shape.rank.is_dynamic else [axis.get_length() if axis.is_static else None for axis in shape]


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> OpenvinoRunner:
    try:
        return serve(library().Core().read_model(directory / MODEL, directory / WEIGHTS), threads)
    except (RuntimeError, ValueError) as error:
        raise EvaluationError(f"OpenVINO can't open it: {reason(error)}", location=str(directory / MODEL)) from error


def serve(model: openvino.Model, threads: int) -> OpenvinoRunner:
    """Compile for the CPU, for requests that come one at a time."""
    settings = {
        "INFERENCE_PRECISION_HINT": precision(model),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "CPU_DENORMALS_OPTIMIZATION": False,
    }
    return OpenvinoRunner(library().Core().compile_model(model, "CPU", settings))


def precision(model: openvino.Model) -> Precision:
    """What a model says that it computes in."""
    said = str(model.get_rt_info(PRECISION).value) if model.has_rt_info(PRECISION) else "f32"
    if said not in ("f32", "bf16"):
        raise ValueError(f"it wants to compute in {said!r}, and f32 and bf16 are known")
    return cast("Precision", said)


def reason(error: Exception) -> str:
    """What OpenVINO says, without where in its sources that was found."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    return (told or lines or [""])[-1]


def parameters(directory: Path) -> int:
    """Elements of the constants that a model learns; quantised ones count like the floats they stand for."""
    return sum(_parameters(net) for net in nets(directory))


def nets(directory: Path) -> Iterator[ElementTree.Element]:
    """The graph and the bodies of its loops and branches, as XML. Raises `EvaluationError` for what is none."""
    try:
        root = ElementTree.parse(directory / MODEL).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise EvaluationError(f"no OpenVINO model: {error}", location=str(directory / MODEL)) from error
    return (node for node in root.iter() if node.find("layers") is not None)


def _parameters(net: ElementTree.Element) -> int:
    kinds = {layer.get("id"): layer.get("type") for layer in net.iterfind("layers/layer")}
    sources = {
        (edge.get("to-layer"), edge.get("to-port")): edge.get("from-layer") for edge in net.iterfind("edges/edge")
    }
    constants = {}
    for layer in net.iterfind("layers/layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and data.get("shape"):
            constants[layer.get("id")] = data.get("element_type"), prod(map(int, data.attrib["shape"].split(",")))

    def origin(layer: str | None, *through: str) -> str | None:
        while kinds.get(layer) in through:
            layer = sources.get((layer, "0"))
        return layer

    grid = set()  # what describes the steps between codes, or between rounded activations
    for (reader, port), source in sources.items():
        kind, first = kinds.get(reader), origin(sources.get((reader, "0")), "Convert", "Subtract")
        of_codes = kind in ("Subtract", "Multiply") and constants.get(first, ("", 0))[0] in CODES
        if port != "0" and (kind == "FakeQuantize" or of_codes):
            grid.add(origin(source, "Convert"))
    return sum(size for name, (element, size) in constants.items() if element in (*FLOATS, *CODES) and name not in grid)
