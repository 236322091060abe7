"""What OpenVINO makes of a quantised model when it compiles it, and where that is no gain on this processor."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from optimize.export import openvino_graph
from optimize.runtimes import openvino as runtime
from optimize.runtimes.openvino import FLOATS

if TYPE_CHECKING:
    from pathlib import Path

    import openvino

    from optimize.context import Context


def advise(directory: Path, context: Context, layers: Collection[str] = ()) -> None:
    """Warn of rounded numbers that OpenVINO computes on in float all the same; `layers` are names of what was rounded
    to compute on codes.
    """
    model = openvino_graph.load(directory)
    executed = runtime.serve(model, threads=1).compiled.get_runtime_model()
    if slow := sorted({*layers} & in_float(executed)):
        context.warn(f"OpenVINO computes {_listed(slow)} in float on this processor: put them on `ignore`")
    if left := {name: kind for name, kind in unfused(model, executed).items() if name not in slow}:
        context.warn(
            f"OpenVINO has no integer operator for {len(left)} nodes that read rounded numbers, so they compute in "
            f"float: {_listed([f'{name} ({kind})' for name, kind in left.items()])}; keep them in float with `ignore`"
        )


def in_float(executed: openvino.Model) -> set[str]:
    """Names of the nodes of a file whose arithmetic is in float."""
    return {
        name for node in executed.get_ops() if _said(node, "runtimePrecision") in FLOATS for name in _originals(node)
    }


def unfused(model: openvino.Model, executed: openvino.Model) -> dict[str, str]:
    """The nodes that read a number which was rounded and is a float again, with the kind of each: behind such a
    `FakeQuantize` OpenVINO found nothing that computes on codes.

    `executed` is the compiled model's `get_runtime_model()`.
    """
    rounding = {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "FakeQuantize"}
    found = {}
    for node in executed.get_ordered_ops():
        # Only what a kernel ends with leaves it: where more follows in the same one, codes stay within.
        if _originals(node)[-1] in rounding and _said(node, "outputPrecisions").split(",")[0] in FLOATS:
            for place in node.output(0).get_target_inputs():
                reader = place.get_node()
                if (kind := _said(reader, "layerType")) != "Output":
                    found[_originals(reader)[0]] = kind
    return found


def _originals(node: openvino.Node) -> list[str]:
    """Names of the file's nodes that this one does the work of, in their order."""
    return _said(node, "originalLayersNames").split(",")


def _said(node: openvino.Node, what: str) -> str:
    return str(node.get_rt_info()[what].value)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
