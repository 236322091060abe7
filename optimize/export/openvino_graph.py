"""OpenVINO models as files: layers that keep their names, and the same bytes every time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from optimize.runtimes.openvino import MODEL, WEIGHTS, library

if TYPE_CHECKING:
    import openvino

_KEPT = "runtime_options"
"""Of what a file says about itself as a whole; the rest are versions, and settings of the tools that made it."""


def load(directory: Path) -> openvino.Model:
    model: openvino.Model = library().Core().read_model(directory / MODEL, directory / WEIGHTS)
    return model


def save(model: openvino.Model, directory: Path, *, half: bool = False) -> None:
    """Write both files; `half` stores floats in 16 bits."""
    _rename(model)
    library().save_model(model, directory / MODEL, compress_to_fp16=half)
    tree = ElementTree.parse(directory / MODEL)
    root = tree.getroot()
    root.set("name", "model")
    for parent in list(root.iter()):
        for info in parent.findall("rt_info"):
            for said in list(info):
                if said.get("name") == "fused_names" or (parent is root and said.tag != _KEPT):
                    info.remove(said)
            if not len(info):
                parent.remove(info)
    ElementTree.indent(tree, "\t")
    tree.write(directory / MODEL, encoding="utf-8", xml_declaration=True)


def _rename(model: openvino.Model) -> None:
    """Number nameless nodes anew: OpenVINO counts all that the process has ever made."""
    count = 0
    for node in model.get_ordered_ops():
        if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):
            count += 1
            node.set_friendly_name(f"{node.get_type_name()}_{count}")
