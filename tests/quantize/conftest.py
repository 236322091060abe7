"""What the tests of several methods start from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.export import onnx as export
from optimize.export import openvino


@pytest.fixture(scope="session")
def pico_graph(pico_source: Artifact, new_context: Callable[..., Context]) -> Artifact:
    """The pico model as an ONNX graph."""
    return export.run(pico_source, export.Config(), new_context())


@pytest.fixture(scope="session")
def pico_openvino(pico_graph: Artifact, new_context: Callable[..., Context]) -> Artifact:
    """The pico model for OpenVINO."""
    return openvino.run(pico_graph, openvino.Config(), new_context())
