"""4-bit weights for OpenVINO, by nncf (https://github.com/openvinotoolkit/nncf), with no calibration.

Each matrix product with a constant weight keeps its codes packed, two in a byte, a scale for every group of inputs.
Embeddings and the last layer, and the share of layers that `ratio` leaves out, get 8 bits. Activations are rounded to
8 bits while it computes, where OpenVINO has such a kernel. It makes files small, and helps where reading weights takes
the time: one token, one short text. Batches are faster in INT8 (`quantize: int8`).

    stages:
      - export: openvino
      - quantize: int4
        group_size: 64
        ratio: 0.8
"""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import openvino_graph
from optimize.quantize import openvino_graphs

VERSION = 1

_CODES = {"i4": "int4", "u4": "int4", "i8": "int8", "u8": "int8"}


class Config(Block):
    """`quantize: int4`."""

    group_size: int = Field(64, ge=-1)
    """Neighbouring inputs that share a scale; -1: all inputs of an output channel. A layer whose width is no multiple
    gets the next smaller power of two, or 8 bits."""
    sym: bool = False
    """Codes lie evenly around 0; False shifts them to use the whole range."""
    ratio: float = Field(1.0, ge=0, le=1)
    """Share of the layers' weights in 4 bits; the rest, the least like 4-bit numbers, get 8."""
    all_layers: bool = False
    """Store embeddings and the last layer in 4 bits, too."""
    ignore: tuple[str, ...] = ()
    """Globs of layer names that stay in float."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where an `ignore` glob matches nothing or nothing could be quantised."""
    model = openvino_graph.load(artifact.path)
    kept = openvino_graphs.matching(openvino_graphs.layers(model), config.ignore)
    with openvino_graphs.library() as nncf:
        modes = nncf.CompressWeightsMode
        model = nncf.compress_weights(
            model,
            mode=modes.INT4_SYM if config.sym else modes.INT4_ASYM,
            group_size=config.group_size,
            ratio=config.ratio,
            all_layers=config.all_layers,
            ignored_scope=nncf.IgnoredScope(names=kept),
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )
    done = Counter(
        _CODES[kind]
        for layer in openvino_graphs.layers(model).values()
        for port in (0, 1)
        if (codes := openvino_graphs.weight(layer.input_value(port)))
        and (kind := codes.get_element_type().get_type_name()) in _CODES
    )
    if not done:
        raise StageError("nothing was quantised", hint="look at `ignore`, and whether the model is quantised already")
    details = {"quantized": dict(sorted(done.items())), "ignored": kept}
    return openvino_graphs.finished(model, artifact, context, details)
