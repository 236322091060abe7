"""What the methods that quantise an ONNX graph share."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact
from optimize.errors import StageError
from optimize.runtimes import onnx

if TYPE_CHECKING:
    from onnx import ModelProto

    from optimize.context import Context


def load(path: Path) -> ModelProto:
    """The graph with its weights and without `value_info`, which goes stale when weights change type and layout."""
    import onnx as library

    model = library.load(path)
    del model.graph.value_info[:]
    return model


def finished(model: ModelProto, artifact: Artifact, context: Context, details: Mapping[str, Any]) -> Artifact:
    """The quantised graph in place of `artifact`'s, with its other files. Raises where ONNX Runtime can't open it."""
    _save(model, context.directory / onnx.MODEL)
    _copy_others(artifact, context.directory)
    onnx.open(context.directory, threads=1)
    result = Artifact.from_directory(
        context.directory,
        format="onnx",
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


def _copy_others(artifact: Artifact, directory: Path) -> None:
    """Everything but the graph and its weights."""
    for name in artifact.files:
        if name != onnx.MODEL and not name.startswith(f"{onnx.MODEL}."):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, directory / name)


def matching(model: ModelProto, operators: Iterable[str], ignore: tuple[str, ...]) -> list[str]:
    """Names of the nodes that a glob matches, or one of whose weights it matches.

    Raises `StageError` where a glob matches none of the `operators`.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    names = {
        node.name: [node.name, *(value for value in node.input if value in constants)]
        for node in model.graph.node
        if node.op_type in operators
    }
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
