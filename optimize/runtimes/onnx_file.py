"""What an ONNX file says about itself, read without its weights, and whether it may be opened.

The file is walked as protobuf wire format over a memory map, so that a model of gigabytes costs a few pages: a score of
peak memory must not show the reader. Every occurrence of a field is visited, also where protobuf would let the last one
win. Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from optimize.errors import EvaluationError

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""The operators that ONNX Runtime brings along. Anything else would need a library of the model's own."""

_DEEPEST = 64
_LEARNT = {1, 10, 11, 16, 2, 3}
"""Element types of parameters: float, float16, double, bfloat16, and quantised as uint8, int8."""
Content = memoryview | int
"""Of a field: its bytes, or the number that stands there."""


@dataclass
class OnnxFile:
    """The facts that matter before a model is opened."""

    domains: set[str] = field(default_factory=set)
    """Of every node, in the graph, its subgraphs and the functions."""
    functions: set[str] = field(default_factory=set)
    """Domains whose operators the file defines itself out of others."""
    external: set[str] = field(default_factory=set)
    """Where tensors say that their data lies."""
    parameters: int = 0
    """Elements of the initialisers of rank 1 and more that hold numbers a model learns."""


def read(path: Path) -> OnnxFile:
    """Walk the file. Raises `EvaluationError` where it is no ONNX file."""
    facts = OnnxFile()
    try:
        with path.open("rb") as stream:
            # Not closed by hand: an error's traceback still holds views of it.
            _model(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)), facts)
    except (OSError, ValueError, IndexError) as error:
        raise EvaluationError(f"no ONNX file: {error}", location=str(path)) from error
    return facts


def check(path: Path) -> OnnxFile:
    """Refuse a file that would run or read anything outside its own folder (`EvaluationError`)."""
    if path.is_symlink():
        raise EvaluationError("the model file is a link", location=str(path))
    facts = read(path)
    if strange := sorted(facts.domains - DOMAINS - facts.functions):
        raise EvaluationError(
            f"the model uses operators of {', '.join(map(repr, strange))}, which only a library of its own has",
            location=str(path),
            hint="export it with ONNX Runtime's own operators",
        )
    for location in sorted(facts.external):
        _refuse_outside(path, location)
    return facts


def _refuse_outside(model: Path, location: str) -> None:
    """External data must be a plain file beside the model or below, with one name and reached without a link."""

    def refuse(why: str) -> EvaluationError:
        return EvaluationError(f"the model's external data {location!r} {why}", location=str(model))

    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or parts[0] == "" or ":" in parts[0] or ".." in parts:
        raise refuse("points out of its folder")
    place = model.parent
    for part in parts:
        place = place / part
        try:
            entry = place.lstat()
        except OSError as error:
            raise refuse("is not there") from error
        if stat.S_ISLNK(entry.st_mode):
            raise refuse("is a symbolic link")
    if not stat.S_ISREG(entry.st_mode):
        raise refuse("is no plain file")
    if entry.st_nlink > 1:
        raise refuse("is a hard link")


# The walk: ModelProto > GraphProto > NodeProto > AttributeProto > TensorProto


def _model(data: Content, facts: OnnxFile) -> None:
    seen = False
    for number, value in _fields(data):
        if number == 7:  # graph
            seen = True
            _graph(value, facts, 0)
        elif number == 25:  # functions
            for inner, content in _fields(value):
                if inner == 7:  # node
                    _node(content, facts, 0)
                elif inner == 10:  # domain
                    facts.functions.add(_text(content))
                elif inner == 11:  # attribute_proto
                    _attribute(content, facts, 0)
        elif number == 20:  # training_info
            raise ValueError("it holds training information, which is no part of a model that serves")
    if not seen:
        raise ValueError("it holds no graph")


def _graph(data: Content, facts: OnnxFile, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("its graphs are nested too deeply")
    for number, value in _fields(data):
        if number == 1:  # node
            _node(value, facts, depth)
        elif number == 5:  # initializer
            facts.parameters += _tensor(value, facts)
        elif number == 15:  # sparse_initializer
            _sparse(value, facts)


def _node(data: Content, facts: OnnxFile, depth: int) -> None:
    domain = ""
    for number, value in _fields(data):
        if number == 7:  # domain
            domain = _text(value)
            facts.domains.add(domain)
        elif number == 5:  # attribute
            _attribute(value, facts, depth)


def _attribute(data: Content, facts: OnnxFile, depth: int) -> None:
    for number, value in _fields(data):
        if number in (5, 10):  # t, tensors
            _tensor(value, facts)
        elif number in (6, 11):  # g, graphs
            _graph(value, facts, depth + 1)
        elif number in (22, 23):  # sparse_tensor, sparse_tensors
            _sparse(value, facts)


def _sparse(data: Content, facts: OnnxFile) -> None:
    for number, value in _fields(data):
        if number in (1, 2):  # values, indices
            _tensor(value, facts)


def _tensor(data: Content, facts: OnnxFile) -> int:
    """The number of its elements, if they are parameters."""
    dims: list[int] = []
    kind = 0
    for number, value in _fields(data):
        if number == 1:  # dims, packed or one by one
            dims += list(_varints(value)) if isinstance(value, memoryview) else [value]
        elif number == 2 and isinstance(value, int):  # data_type
            kind = value
        elif number == 13:  # external_data
            entry = {inner: _text(content) for inner, content in _fields(value) if inner in (1, 2)}
            if entry.get(1) == "location":
                facts.external.add(entry.get(2, ""))
    return prod(dims) if dims and kind in _LEARNT else 0


# Wire format (https://protobuf.dev/programming-guides/encoding/)


def _fields(data: Content) -> Iterator[tuple[int, Content]]:
    """(field number, content) of a message: bytes as a view, a varint as a number; fixed-width ones are skipped."""
    if isinstance(data, int):
        raise ValueError("a message was expected")
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
        elif kind == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("it is cut short")
            yield number, data[position : position + length]
            position += length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _text(data: Content) -> str:
    if isinstance(data, int):
        raise ValueError("a text was expected")
    return bytes(data).decode()
