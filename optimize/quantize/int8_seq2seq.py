"""`quantize: int8`, `mode: dynamic` of an encoder's and a decoder's graph: what `int8_onnxruntime.py` does for one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize import graphs, int8_onnxruntime
from optimize.runtimes.onnx_seq2seq import GRAPHS

if TYPE_CHECKING:
    from onnx import ModelProto

    from optimize.quantize.int8_onnxruntime import Config


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise both. Raises `StageError` for what only one graph can have, and where nothing could be quantised."""
    if config.mode != "dynamic" or config.max_drop is not None:
        raise StageError(
            "a model that is an encoder's and a decoder's graph is quantised by mode: dynamic, without max_drop",
            hint="keep sensitive layers in float with `ignore`",
        )
    models = {name: graphs.load(artifact.path / name) for name in GRAPHS}
    ignored = _ignored(models, config.ignore)
    quantized = {
        name: int8_onnxruntime.quantize_dynamic(model, ignored[name], config, context.scratch)
        for name, model in models.items()
    }
    counts = Counter(node.op_type for model in quantized.values() for node in model.graph.node)
    done = {name: counts[name] for name in int8_onnxruntime.RESULTS if counts[name]}
    if not done:
        raise StageError("nothing was quantised", hint="look at `ignore`, and whether the model is quantised already")
    return graphs.finished_all(
        quantized, artifact, context, {"mode": config.mode, "ignored": ignored, "quantized": done}
    )


def _ignored(models: Mapping[str, ModelProto], globs: Sequence[str]) -> dict[str, list[str]]:
    """Graph -> nodes that stay in float. A glob has to match a node of one graph or the other."""
    kept: dict[str, list[str]] = {name: [] for name in models}
    for glob in globs:
        before = sum(map(len, kept.values()))
        for name, model in models.items():
            with contextlib.suppress(StageError):
                kept[name] += graphs.matching(model, int8_onnxruntime.OPERATORS, (glob,))
        if sum(map(len, kept.values())) == before:
            raise StageError(f"`ignore` {glob!r} matches no node of {', '.join(models)}")
    return kept
