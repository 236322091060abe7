"""What the methods that quantise an OpenVINO model share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact
from optimize.errors import StageError
from optimize.export import openvino_graph
from optimize.quantize import graphs
from optimize.quiet import quiet
from optimize.runtimes import openvino as runtime

if TYPE_CHECKING:
    import openvino

    from optimize.context import Context

LAYERS = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "Gather")
"""Operators that compute on weights, or, attention's own, on two activations; a `Gather` of weights is an embedding."""


@contextlib.contextmanager
def library() -> Iterator[Any]:
    """The module nncf, which neither sends telemetry nor prints; what it raises becomes a `StageError`."""
    runtime.library()
    with quiet():
        import nncf

        try:
            yield nncf
        except (RuntimeError, ValueError, nncf.ValidationError, nncf.InternalError) as error:
            raise StageError(f"nncf can't quantise the model: {runtime.reason(error)}") from error


def layers(model: openvino.Model) -> dict[str, openvino.Node]:
    """What could be quantised, by name, in the order in which it computes."""
    return {
        node.get_friendly_name(): node
        for node in model.get_ordered_ops()
        if node.get_type_name() in LAYERS and (node.get_type_name() != "Gather" or _is_embedding(node))
    }


def _is_embedding(gather: openvino.Node) -> bool:
    table = gather.input_value(0)
    if not table.get_element_type().is_real() or weight(table) is None:
        return False
    return bool(table.get_partial_shape().rank.get_length() > 1)


def weight(value: openvino.Output) -> openvino.Node | None:
    """The constant that a value is, perhaps stored in another type or rounded."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "FakeQuantize", "Multiply", "Subtract", "Reshape"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def matching(names: Mapping[str, Any], ignore: tuple[str, ...]) -> list[str]:
    """The layers that a glob matches. Raises `StageError` where a glob matches none."""
    kept = set()
    for glob in ignore:
        matched = [name for name in names if fnmatchcase(name, glob)]
        if not matched:
            raise StageError(
                f"`ignore` {glob!r} matches no layer ({', '.join(LAYERS)})",
                hint=f"layer names look like {next(iter(names), '(none)')!r}",
            )
        kept.update(matched)
    return sorted(kept)


def finished(model: openvino.Model, artifact: Artifact, context: Context, details: Mapping[str, Any]) -> Artifact:
    """The quantised model in place of `artifact`'s, with its other files."""
    openvino_graph.save(model, context.directory)
    artifact.copy_files(context.directory, lambda name: name not in (runtime.MODEL, runtime.WEIGHTS))
    return graphs.described(artifact, context, details)
