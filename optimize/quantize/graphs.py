"""What the methods that quantise an ONNX graph share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact
from optimize.errors import StageError
from optimize.runtimes import onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from optimize.context import Context


def load(path: Path) -> ModelProto:
    """The graph with its weights and without `value_info`, which goes stale when weights change type and layout."""
    import onnx as library

    model = library.load(path)
    del model.graph.value_info[:]
    return model


def finished(model: ModelProto, artifact: Artifact, context: Context, details: Mapping[str, Any]) -> Artifact:
    """The quantised graph in place of `artifact`'s, with its other files. Raises where ONNX Runtime can't open it."""
    return finished_all({onnx.MODEL: model}, artifact, context, details)


def finished_all(
    models: Mapping[str, ModelProto], artifact: Artifact, context: Context, details: Mapping[str, Any]
) -> Artifact:
    """`finished` for an artifact of several graphs, by the names of their files."""
    for name, model in models.items():
        _save(model, context.directory / name)
    artifact.copy_files(context.directory, lambda name: not any(f"{name}.".startswith(f"{graph}.") for graph in models))
    onnx.open(context.directory, threads=1)
    return described(artifact, context, details)


def described(artifact: Artifact, context: Context, details: Mapping[str, Any]) -> Artifact:
    """What was made of `artifact`, in the same format; warns where it is no smaller."""
    result = Artifact.from_directory(
        context.directory,
        format=artifact.format,
        task=artifact.task,
        details=details,
        trust_remote_code=artifact.trust_remote_code,
    )
    if result.size_bytes >= artifact.size_bytes:
        context.warn("the quantised file is no smaller than its parent")
    return result


def _save(model: ModelProto, path: Path) -> None:
    """The same bytes every time, and no paths."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    path.write_bytes(model.SerializeToString(deterministic=True))


def matching(model: ModelProto, operators: Iterable[str], ignore: tuple[str, ...]) -> list[str]:
    """Names of the nodes that a glob matches, or one of whose weights it matches.

    Raises `StageError` where a glob matches none of the `operators`.
    """
    names = {node.name: [node.name, *weights] for node, weights in _constants(model, operators)}
    kept = []
    for glob in ignore:
        matched = [node for node, known in names.items() if any(fnmatchcase(name, glob) for name in known)]
        if not matched:
            raise StageError(
                f"`ignore` {glob!r} matches no node of {', '.join(operators)}",
                hint=f"node names look like {next(iter(names), '(none)')!r}",
            )
        kept += matched
    return sorted(set(kept))


def weighted(model: ModelProto, operators: Iterable[str]) -> list[str]:
    """Names of the nodes that read a constant matrix in float."""
    matrices = {tensor.name for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1}
    return [node.name for node, constants in _constants(model, operators) if matrices & set(constants)]


def _constants(model: ModelProto, operators: Iterable[str]) -> Iterator[tuple[NodeProto, list[str]]]:
    """Nodes and the constants that they read."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in operators:
            yield node, [name for name in node.input if name in constants]
